"""Figure 3: how much of the signal each noise schedule leaves."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ...noise_schedules import clean_target_weight, noise_schedule_tables
from .style import FONT, ONE_COLUMN, SERIES, new_figure, say


PATH = ("ddpm_linear", "linear_gamma_squared", "linear_sigma", "single_level")  # the schedules along the path


def schedules_figure(names: Sequence[str] = PATH, num_train_timesteps: int = 1000) -> Figure:
    """The signal's share of the variance, gamma² / (gamma² + sigma²), over the timesteps.

    Where a schedule preserves the variance, that is gamma²; where it does not scale the signal, it is the gamma² of
    the schedule with the same signal-to-noise ratios that does.

    Raises:
        ValueError: there is no schedule of a name, or not even one timestep.
    """
    figure = new_figure(ONE_COLUMN, 1.9)
    axis = figure.subplots()
    for name, style in zip(names, SERIES, strict=False):
        share = clean_target_weight(*noise_schedule_tables(name, num_train_timesteps))
        if len(share) == 1:
            share = share.expand(num_train_timesteps)
        line = {key: style[key] for key in ("color", "linestyle")}
        axis.plot(range(num_train_timesteps), share.numpy(), linewidth=1.3, label=name, **line)
    say(axis, "timestep t", "γ² / (γ² + σ²)")
    axis.set_xlim(0, num_train_timesteps)
    axis.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=2, fontsize=FONT, frameon=False, handlelength=2.2)
    return figure
