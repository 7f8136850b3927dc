"""What a run tells of itself: its metrics, and a summary with curves at its end."""

import glob
import io
import json
import math
import os.path as osp
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..checkpoint import write_file

# The metrics by which the paper reports, in this order; higher is better.
HEADLINES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'top1')
# Name and step to value, for each number that was logged.
Curves = dict[str, dict[int, float]]


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
        if is_main_process():
            super().after_test_epoch(runner, metrics)


@HOOKS.register_module()
class SummaryHook(Hook):
    """Log at the end of training what one looks for in the log otherwise.

    That is: the time, the images per second of all processes, the best value of the
    metric (the first of box AP, mask AP, mIoU and top-1 accuracy that the validation
    gives), the checkpoints, the folder of the logs, and ``curves.png`` in the work dir,
    with the losses, the learning rate and the metrics of this run and of those that it
    has resumed there.
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

        folder, info = runner.work_dir, runner.message_hub.runtime_info
        trained, validated = read_curves(folder)
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        unit = 'epoch' if by_epoch else 'iteration'
        found = {name.rpartition('/')[2]: name for name in validated}
        name = next((found[h] for h in HEADLINES if h in found), None)
        if name:
            curve = validated[name]
            step = max(curve, key=curve.get)
            yield f'best     {name} {curve[step]:.4f} after {unit} {step}'
        # Of save_best of the checkpoint hook, with one metric or several.
        for key in [key for key in info if key.startswith('best_ckpt')] + ['last_ckpt']:
            if info.get(key):
                yield f'saved    {info[key]}'
        yield f'logs     {runner.log_dir}'
        if trained:
            path, title = osp.join(folder, 'curves.png'), osp.basename(folder)
            write_file(path, draw_curves(trained, validated, unit, title), True)
            yield f'curves   {path}'


def read_curves(work_dir: str) -> list[Curves]:
    """Read what the runs in a work dir have logged.

    Where one goes back to an earlier step than the one before has come to, what it
    logs takes the place of all values from there on.

    Args:
        work_dir: With ``TIMESTAMP/vis_data/scalars.json`` of each run.

    Returns:
        Values by name and step: those of training, whose steps are iterations, and
        those of validation.
    """
    trained, validated = defaultdict(dict), defaultdict(dict)
    pattern = osp.join(glob.escape(work_dir), '*', 'vis_data', 'scalars.json')
    for path in sorted(glob.glob(pattern)):
        with open(path, encoding='utf-8') as file:
            for line in file:
                try:
                    values = json.loads(line)
                    step = values.pop('step')
                # A run that was killed may have left half a line.
                except (ValueError, KeyError, AttributeError):
                    continue
                curves = trained if 'iter' in values else validated
                for name, value in values.items():
                    curve = curves[name]
                    while curve and next(reversed(curve)) >= step:
                        curve.popitem()
                    if isinstance(value, (int, float)) and math.isfinite(value):
                        curve[step] = value
    return [{n: c for n, c in curves.items() if c} for curves in (trained, validated)]


def draw_curves(trained: Curves, validated: Curves, unit: str, title: str) -> bytes:
    """Draw losses, learning rate and metrics below one another, as a PNG.

    Args:
        trained: Of :func:`read_curves`.
        validated: As ``trained``; without any, two panels remain.
        unit: What the steps of the validation count.
        title: The name of the run.
    """
    # matplotlib is imported here, as nothing else in a training needs it.
    from matplotlib.figure import Figure

    losses = {name: curve for name, curve in trained.items() if 'loss' in name}
    rates = {n: curve for n, curve in trained.items() if n.rpartition('.')[2] == 'lr'}
    # mmdet gives -1 where there is nothing to measure.
    metrics = {
        name: curve
        for name, curve in validated.items()
        if name not in ('time', 'data_time') and set(curve.values()) != {-1}
    }
    panels = [
        ('loss', 'iteration', losses),
        ('learning rate', 'iteration', rates),
        ('metrics of the validation', unit, metrics),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(9, 3 * len(panels) + 0.5), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (label, steps, curves) in zip(axes, panels):
        for name, curve in curves.items():
            marker = 'o' if len(curve) < 50 else None
            ax.plot(*zip(*curve.items()), marker=marker, markersize=4, label=name)
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
