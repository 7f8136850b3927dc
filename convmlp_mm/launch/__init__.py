"""What the command lines share: read a configuration, check it, build its Runner."""

# ruff: noqa: F401
from .checks import check_checkpoint, check_data, check_gpus, naming_data
from .options import (
    add_backbone,
    add_cfg_options,
    add_common_arguments,
    load_config,
    merge_options,
    read_model,
)
from .process import (
    closing_group,
    end_with_launcher,
    final_mistakes,
    keep_memory,
    one_line_errors,
)
from .runner import (
    build_runner,
    checkpoint_of_restart,
    lock_of_training,
    read_slurm,
    read_weights_only,
)
