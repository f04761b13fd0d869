"""Fine-tune an encoder for the classes of any labelled data set, with the Trainer of transformers.

    python examples/finetune.py --dataset cifar10 --train-split "train[:5000]" --output-dir runs/classifier
    python examples/finetune.py --dataset path/to/imagefolder --push-to-hub you/your-classifier

The encoder starts as the same function of an image, folded into a plain ViT of transformers, and then all weights are
trained, so that it learns from all pixels of a patch too. The folder `model` that it leaves behind needs nothing else:

    from transformers import pipeline
    pipeline("image-classification", model="runs/classifier/model")("cat.jpg")

This is short, to be changed. For numbers to report take `ldae finetune`, which has the paper's recipe.
"""

import random
from pathlib import Path

import typer
from PIL import ImageOps
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from ldae_hf.export import to_transformers
from ldae_hf.export.transformers_vit import stock_processor
from ldae_hf.hub import upload
from ldae_hf.training import load_images


class Inputs(Dataset):
    """Images of a source as the model takes them; in training half of them are mirrored."""

    def __init__(self, source, processor, train: bool):
        self.source, self.processor, self.train = source, processor, train

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label, _ = self.source.read_or_replace(index)
        if self.train and random.random() < 0.5:
            image = ImageOps.mirror(image)
        return {"pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0], "labels": label}


def accuracy(result) -> dict:
    return {"accuracy": float((result.predictions.argmax(axis=-1) == result.label_ids).mean())}


def finetune(
    dataset: str = "cifar10",
    train_split: str = "train",
    test_split: str = "test",
    encoder: str = "model_cards/ldae-cifar10",
    output_dir: Path = Path("runs/classifier"),
    epochs: float = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    num_workers: int = 2,
    seed: int = 0,
    push_to_hub: str | None = None,
):
    """Train, measure on the test images after every epoch, and save the model with its processor."""
    set_seed(seed)
    train, test = load_images(dataset, train_split), load_images(dataset, test_split)
    names = train.label_names or [str(number) for number in range(train.num_classes)]
    processor = AutoImageProcessor.from_pretrained(encoder)
    classifier = AutoModelForImageClassification.from_pretrained(
        encoder, id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)}
    )
    model = to_transformers(classifier)  # an IJepaForImageClassification

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",  # the test images choose no epoch: the last one counts
        dataloader_num_workers=num_workers,
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Inputs(train, processor, train=True),
        eval_dataset=Inputs(test, processor, train=False),
        compute_metrics=accuracy,
    )
    trainer.train()
    score = trainer.evaluate()["eval_accuracy"]
    # Not `trainer.save_model`, which adds a pickle of the arguments.
    folder = output_dir / "model"
    model.save_pretrained(folder)
    stock_processor(processor).save_pretrained(folder)
    typer.echo(f"{folder}: {100 * score:.1f} % of {len(test)} test images right")
    if push_to_hub:
        typer.echo(upload(folder, push_to_hub))


if __name__ == "__main__":
    typer.run(finetune)
