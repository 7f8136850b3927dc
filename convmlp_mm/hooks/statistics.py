"""The numbers of a run: statistics of BN while it trains, a summary at its end."""

from __future__ import annotations

import glob
import io
import json
import math
import os.path as osp
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta

from mmengine.dist import get_world_size, is_distributed, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import write_file
from .checkpoint import checkpoint_hooks
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

    # This hook comes after CheckpointHook, which may save at the end.
    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Note when and where the run begins."""
        self._start, self._first = time.monotonic(), runner.iter

    def after_train(self, runner: Runner) -> None:
        """Draw the curves and log the summary, in the first process."""
        if not is_main_process():
            return
        lines = ['Summary']
        try:
            for line in self._lines(runner):
                lines.append(f'  {line}')
        # The run is over and saved, whatever is wrong with its curves.
        except Exception as error:
            runner.logger.warning(f'The summary is cut short: {error!r}')
        runner.logger.info('\n'.join(lines))

    def _lines(self, runner: Runner) -> Iterator[str]:
        seconds = timedelta(seconds=round(time.monotonic() - self._start))
        yield f'trained  {runner.iter - self._first} iterations in {seconds}'
        batch = getattr(runner.train_dataloader.batch_sampler, 'batch_size', None)
        times = runner.message_hub.log_scalars.get('train/time')
        if batch and times:
            yield f'speed    {batch * get_world_size() / times.mean():.1f} images/s'

        hooks, folder = checkpoint_hooks(runner), runner.work_dir
        info = runner.message_hub.runtime_info
        trained, validated = read_curves(folder)
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        unit = 'epoch' if by_epoch else 'iteration'
        best = [key for key in info if key.startswith('best_score')]
        for key in best:
            name = key[len('best_score_') :] or hooks[0].key_indicators[0]
            path = info.get(key.replace('score', 'ckpt'))
            yield f'best     {name} {float(info[key]):.4f} in {path}'
        headlines = _headlines(validated)
        if headlines and not best:
            name = headlines[0]
            step = max(validated[name], key=validated[name].get)
            line = f'best     {name} {validated[name][step]:.4f} after {unit} {step}'
            for hook in hooks:
                path = osp.join(str(hook.out_dir), hook.filename_tmpl.format(step))
                line += f' in {path}' if osp.exists(path) else ''
            yield line
        for hook in hooks:
            if hook.last_ckpt:
                yield f'last     {hook.last_ckpt}'
        yield f'logs     {runner.log_dir}'
        if trained:
            path, title = osp.join(folder, 'curves.png'), osp.basename(folder)
            write_file(path, draw_curves(trained, validated, unit, title), True)
            yield f'curves   {path}'


def _headlines(curves: Curves) -> list[str]:
    return [n for h in HEADLINES for n in curves if n.rpartition('/')[2] == h]


def read_curves(work_dir: str) -> list[Curves]:
    """Read what the runs in a work dir have logged.

    Args:
        work_dir (str): With ``TIMESTAMP/vis_data/scalars.json`` of each run. Where one
            goes back to an earlier step than the one before has come to, its values
            count.

    Returns:
        list[Curves]: Values by name and step: those of training, whose steps are
        iterations, and those of validation.
    """
    trained, validated = defaultdict(dict), defaultdict(dict)
    pattern = osp.join(glob.escape(work_dir), '*', 'vis_data', 'scalars.json')
    for path in sorted(glob.glob(pattern)):
        fresh = {True, False}
        with open(path, encoding='utf-8') as file:
            for line in file:
                try:
                    values = json.loads(line)
                    step = values.pop('step')
                # A run that was killed may have left half a line.
                except (ValueError, KeyError, AttributeError):
                    continue
                is_training = 'iter' in values
                curves = trained if is_training else validated
                if is_training in fresh:
                    fresh.remove(is_training)
                    for name, curve in curves.items():
                        curves[name] = {s: v for s, v in curve.items() if s < step}
                for name, value in values.items():
                    if isinstance(value, (int, float)) and math.isfinite(value):
                        curves[name][step] = value
    return [{n: c for n, c in curves.items() if c} for curves in (trained, validated)]


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
    # matplotlib is imported here, as nothing else in a training needs it.
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
        # A loss that falls by orders of magnitude would end as a flat line.
        if total and 0 < 50 * min(total) < max(total):
            ax.set_yscale('log')
        ax.set(xlabel=steps, ylabel=label, xlim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if len(curves) > 1:
            ax.legend(loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=120)
    return image.getvalue()
