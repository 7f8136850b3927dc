# What every configuration of this package adds to the runtime of its toolkit.
custom_imports = dict(imports=['convmlp_mm'], allow_failed_imports=False)
randomness = dict(seed=42)
