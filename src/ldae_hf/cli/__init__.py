"""The `ldae` command: one thin command per job, which imports what it needs when it runs, so that help is quick."""

import typer

from . import data, extractor, figure, recipes, results, sweep, tokenizer, weights
from .card import card
from .compare import compare
from .download import download
from .evaluate import attentive_probe, few_shot, knn, probe
from .export import export
from .fid import fid
from .finetune import finetune
from .full_probe import full_probe
from .generate import denoise, generate, pipeline
from .options import PLAIN
from .plan import plan
from .pretrain import pretrain
from .push import push
from .replay import replay
from .report import report
from .reproduce import reproduce
from .retrieve import retrieve
from .segment import segment
from .verify import verify


app = typer.Typer(**PLAIN, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def ldae():
    """Latent denoising autoencoders (l-DAE): train them, measure them, publish them.

    \b
    ldae recipes tree                        what there is to train
    ldae recipes show l_dae --tier cpu       every value of one run
    """


app.command()(plan)
app.command()(pretrain)
app.command()(replay)
app.command()(report)
app.command()(verify)
app.add_typer(data.app, name="data")
app.add_typer(extractor.app, name="extractor")
app.add_typer(tokenizer.app, name="tokenizer")
app.command()(probe)
app.command()(knn)
app.command()(few_shot)
app.command()(attentive_probe)
app.command()(full_probe)
app.command()(compare)
app.command()(reproduce)
app.command()(finetune)
app.command()(segment)
app.command()(retrieve)
app.add_typer(sweep.app, name="sweep")
app.command()(fid)
app.add_typer(figure.app, name="figure")
app.command()(generate)
app.command()(denoise)
app.command()(pipeline)
app.command()(export)
app.command()(card)
app.command()(push)
app.command()(download)
app.add_typer(recipes.app, name="recipes")
app.add_typer(results.app, name="results")
app.add_typer(weights.app, name="weights")
