# What every configuration of this package adds to the runtime of its toolkit, in one
# place. Each file beside this one joins it to the recipe of one system.
custom_imports = dict(imports=['convmlp_mm'], allow_failed_imports=False)
# A configuration that replaces custom_hooks is told which of these it leaves out.
# They run in this order: by the priority of each class, which an entry can change, as
# dict(type='SummaryHook', priority='LOW'), and then as they stand here.
runtime_hooks = [
    # load_from takes published weights, and all of the backbone or nothing.
    dict(type='CheckWeightsHook'),
    # Neck and head work in the layout of the backbone's maps.
    dict(type='ChannelsLastHook'),
    # What compile=True means: one graph of the backbone.
    dict(type='CompileBackboneHook'),
    # A loss of NaN or Inf ends the run, and no checkpoint with either in it is
    # written.
    dict(type='FiniteLossHook'),
    # The processes do not share the running statistics of BN while they train:
    # without this, only those of the first process would reach the checkpoint.
    dict(type='SyncStatisticsHook'),
    # Data and heads have the same classes; what cannot be loaded is named.
    dict(type='CheckDataHook'),
    # No process trains on from another place than the others, nor with a learning
    # rate for batches of another size.
    dict(type='AgreementHook'),
    # A run that is resumed ends as it would have without the interruption.
    dict(type='ExactResumeHook'),
    # SIGTERM and SIGUSR1 save a checkpoint and stop, for clusters that preempt.
    dict(type='PreemptionHook'),
    # A summary and the curves of a training, at its end.
    dict(type='SummaryHook'),
]
custom_hooks = [*runtime_hooks]
# What replaces default hooks of the toolkit. Two bases may not have the same key, so
# the recipes of the systems take it over as default_hooks.
runtime_default_hooks = dict(
    # Kills and full disks leave whole checkpoints.
    checkpoint=dict(type='SafeCheckpointHook'),
    # The first of several processes that test writes the metrics.
    logger=dict(type='MainProcessLoggerHook'),
)
