# What every configuration of this package adds to the runtime of its toolkit.
custom_imports = dict(imports=['convmlp_mm'], allow_failed_imports=False)
custom_hooks = [
    # load_from takes published weights, and all of the backbone or nothing.
    dict(type='CheckWeightsHook'),
    # Neck and head work in the layout of the backbone's maps.
    dict(type='ChannelsLastHook'),
    # What compile=True means: one graph of the backbone.
    dict(type='CompileBackboneHook'),
    # The processes do not share the running statistics of BN while they train:
    # without this, only those of the first process would reach the checkpoint.
    dict(type='SyncStatisticsHook'),
    # Of several processes that test, one writes the metrics.
    dict(type='OneMetricsFileHook'),
    # Curves for TensorBoard, where it is installed.
    dict(type='TensorBoardHook'),
    # What the training has come to, at its end.
    dict(type='SummaryHook'),
]
