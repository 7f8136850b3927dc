# What every configuration of this package adds to the runtime of its toolkit.
custom_imports = dict(imports=['convmlp_mm'], allow_failed_imports=False)
# The processes do not share the running statistics of BN while they train: without
# this, only those of the first process would reach the checkpoint.
custom_hooks = [dict(type='SyncBuffersHook')]
