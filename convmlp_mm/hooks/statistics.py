"""The numbers of a run: statistics of BN while it trains, a summary at its end."""

from __future__ import annotations

import glob
import io
import json
import math
import os.path as osp
import time
from collections import defaultdict
from datetime import timedelta

from mmengine.dist import get_world_size, is_distributed, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from ..files import write_file
from .saving import checkpoint_hooks
from .stop import StepHook

__all__ = ['MainProcessLoggerHook', 'SummaryHook', 'SyncStatisticsHook']

# The metrics by which the paper reports, in this order; higher is better.
HEADLINES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'top1')
# Name and step to value, for each number that was logged.
Curves = dict[str, dict[int, float]]


@HOOKS.register_module()
class SyncStatisticsHook(StepHook):
    """Average the running statistics of BN over the processes in each iteration.

    Each process normalises its own images by BN and has running statistics of its
    own, of which a checkpoint takes those of the first process. mmengine's
    ``SyncBuffersHook`` averages them at the end of an epoch or before a validation:
    too late for checkpoints of iteration-based training, and never in the copy that
    ``EMAHook`` keeps and saves. As the statistics are linear in those of the
    batches, the average is the same whenever it is taken.

    They are two numbers for each channel in the vector of :class:`StepHook`. BN layers
    that are in evaluation mode, and SyncBN, which has nothing to average, take no part.
    """

    def numbers(self, runner: Runner, outputs: object) -> list[Tensor]:
        """Return the statistics of the model; none in a single process."""
        if not is_distributed():
            return []
        return [
            buffer
            for module in runner.model.modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, SyncBatchNorm)
            and module.training
            and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
        ]


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """mmengine's logger, which writes the metrics of a test in the first process only.

    mmengine's own does it in all of them, into the same file and each with a ``time``
    of its own: if two write at once, the file may be no JSON. The metrics of
    iteration-based training stand at their iteration; mmengine's default for all of
    them is epoch 0.
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the steps of the metrics."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self.log_metric_by_epoch = False

    def after_test_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Log and write the metrics."""
        if is_main_process():
            super().after_test_epoch(runner, metrics)


@HOOKS.register_module()
class SummaryHook(Hook):
    """Log at the end of training what one looks for in the log otherwise.

    That is: the time, the images per second of all processes, the best value of the
    metric and its checkpoint, the last checkpoint, the folder of the logs, and
    ``curves.png`` in the work dir, with the losses, the learning rate and the metrics
    of this run and of those that it has resumed there.

    The metric is that of ``save_best`` of the checkpoint hook, else the first of box
    AP, mask AP, mIoU and top-1 accuracy that the validation gives.
    """

    # After CheckpointHook, which may save at the end.
    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Note when and where the run begins."""
        self._start, self._first = time.monotonic(), runner.iter

    def after_train(self, runner: Runner) -> None:
        """Draw the curves and log the summary, in the first process."""
        if not is_main_process():
            return
        seconds = timedelta(seconds=round(time.monotonic() - self._start))
        lines = [f'trained  {runner.iter - self._first} iterations in {seconds}']
        batch = runner.train_dataloader.batch_sampler
        times = runner.message_hub.log_scalars.get('train/time')
        if times and getattr(batch, 'batch_size', None):
            rate = batch.batch_size * get_world_size() / times.mean()
            lines.append(f'speed    {rate:.1f} images/s')
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        unit = 'epoch' if by_epoch else 'iteration'
        trained, validated = read_curves(runner.work_dir)
        hooks = checkpoint_hooks(runner)
        info = runner.message_hub.runtime_info
        best = [key for key in info if key.startswith('best_score')]
        for key in best:
            name = key[len('best_score_') :] or hooks[0].key_indicators[0]
            path = info.get(key.replace('score', 'ckpt'))
            lines.append(f'best     {name} {float(info[key]):.4f} in {path}')
        headlines = _headlines(validated)
        if headlines and not best:
            name = headlines[0]
            step, value = max(validated[name].items(), key=lambda item: item[1])
            lines.append(f'best     {name} {value:.4f} after {unit} {step}')
            for hook in hooks:
                path = osp.join(str(hook.out_dir), hook.filename_tmpl.format(step))
                lines[-1] += f' in {path}' if osp.exists(path) else ''
        lines += [f'last     {hook.last_ckpt}' for hook in hooks if hook.last_ckpt]
        lines.append(f'logs     {runner.log_dir}')
        path = osp.join(runner.work_dir, 'curves.png')
        try:
            if trained:
                title = osp.basename(osp.realpath(runner.work_dir))
                write_file(path, draw_curves(trained, validated, unit, title), True)
                lines.append(f'curves   {path}')
        # The run is over and saved, whatever is wrong with the figure.
        except Exception as error:
            runner.logger.warning(f'{path} is not drawn: {error!r}')
        runner.logger.info('\n  '.join(['Summary', *lines]))


def _headlines(curves: Curves) -> list[str]:
    return [n for h in HEADLINES for n in curves if n.rpartition('/')[2] == h]


def read_curves(work_dir: str) -> tuple[Curves, Curves]:
    """Read what the runs in a work dir have logged.

    Args:
        work_dir (str): With ``TIMESTAMP/vis_data/scalars.json`` of each run. Where one
            goes back to an earlier step than the one before has come to, its values
            count.

    Returns:
        tuple[Curves, Curves]: Values by name and step, those of training, whose steps
        are iterations, and those of validation.
    """
    trained, validated = defaultdict(dict), defaultdict(dict)
    pattern = osp.join(glob.escape(work_dir), '*', 'vis_data', 'scalars.json')
    for path in sorted(glob.glob(pattern)):
        fresh = [trained, validated]
        with open(path, encoding='utf-8') as file:
            for line in file:
                try:
                    values = json.loads(line)
                    step = values.pop('step')
                # A run that was killed may have left half a line.
                except (ValueError, KeyError, AttributeError):
                    continue
                curves = trained if 'iter' in values else validated
                if curves in fresh:
                    fresh.remove(curves)
                    for curve in curves.values():
                        for old in [s for s in curve if s >= step]:
                            del curve[old]
                for name, value in values.items():
                    if isinstance(value, (int, float)) and math.isfinite(value):
                        curves[name][step] = value
    return trained, validated


def draw_curves(trained: Curves, validated: Curves, unit: str, title: str) -> bytes:
    """Draw losses, learning rate and metrics below one another.

    Args:
        trained (Curves): Of :func:`read_curves`.
        validated (Curves): As ``trained``; without any, two panels remain.
        unit (str): What the steps of the validation count: ``'epoch'`` or
            ``'iteration'``.
        title (str): The name of the run.

    Returns:
        bytes: A PNG.
    """
    # Nothing else of a training needs it.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    losses = {name: curve for name, curve in trained.items() if 'loss' in name}
    rates = {n: curve for n, curve in trained.items() if n.rpartition('.')[2] == 'lr'}
    # mmdet gives -1 where there is nothing to measure.
    times = 'time', 'data_time'
    metrics = {
        name: curve
        for name, curve in validated.items()
        if name not in times and set(curve.values()) != {-1}
    }
    panels = [
        ('loss', 'iteration', losses),
        ('learning rate', 'iteration', rates),
        ('metrics of the validation', unit, metrics),
    ]
    panels = [panel for panel in panels if any(panel[2].values())]
    figure = Figure(figsize=(9, 3 * len(panels) + 0.5), layout='constrained')
    figure.suptitle(title)
    thick = {'loss', *rates, *_headlines(metrics)}
    for ax, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        label, steps, curves = panel
        if len(curves) > 10:
            ax.set_prop_cycle(color=colormaps['tab20'].colors)
        for name, curve in curves.items():
            width = 2 if name in thick else 1
            marker = 'o' if len(curve) < 50 else None
            points = list(curve), list(curve.values())
            ax.plot(*points, linewidth=width, marker=marker, markersize=4, label=name)
        total = list(curves.get('loss', {}).values())
        # Where the loss falls by orders of magnitude, its end is a flat line otherwise.
        if total and 0 < 50 * min(total) < max(total):
            ax.set_yscale('log')
        ax.set(xlabel=steps, ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if len(curves) > 1:
            ax.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    return image.getvalue()
