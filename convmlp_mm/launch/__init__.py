"""What the command lines share: read a configuration, check it, build its Runner.

The three toolkits each have a train and a test script that differ in a few
lines. These functions are the part that they have in common, with the checks
that users otherwise meet as a stack trace from every process.
"""

from .checks import check_checkpoint, check_data, check_gpus, naming_data
from .errors import closing_group, final_mistakes, one_line_errors
from .options import (
    add_cfg_options,
    add_common_arguments,
    load_config,
    merge_options,
)
from .runner import (
    build_runner,
    checkpoint_of_restart,
    lock_of_training,
    plain_optim_wrapper,
    read_slurm,
    read_weights_only,
)

__all__ = [
    'add_cfg_options',
    'add_common_arguments',
    'build_runner',
    'check_checkpoint',
    'check_data',
    'check_gpus',
    'checkpoint_of_restart',
    'closing_group',
    'final_mistakes',
    'load_config',
    'lock_of_training',
    'merge_options',
    'naming_data',
    'one_line_errors',
    'plain_optim_wrapper',
    'read_slurm',
    'read_weights_only',
]
