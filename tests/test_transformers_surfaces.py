"""What a user of transformers does with a published model: pipelines, Trainer, dtypes, devices, compilation."""

import json

import pytest
import torch
from tiny_encoder import pictures, save_tiny_encoder, tiny_model, tiny_processor
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
    pipeline,
)

from ldae_hf import LDAEForImageClassification, LDAEForPreTraining, LDAEImageProcessor, LDAEModel


LABELS = {0: "dark", 1: "bright"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def classifier(encoder, tmp_path_factory):
    """A folder as a fine-tuned model's is: weights with a head, labels, processor."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names = dict(id2label=LABELS, label2id={name: number for number, name in LABELS.items()})
    AutoModelForImageClassification.from_pretrained(encoder, **names).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixel_values(encoder):
    return AutoImageProcessor.from_pretrained(encoder)(pictures(7), return_tensors="pt")["pixel_values"]


# ---- pipelines


def test_the_feature_pipeline_gives_the_models_own_features(encoder, pixel_values):
    extract = pipeline("image-feature-extraction", model=str(encoder))
    expected = LDAEModel.from_pretrained(encoder)(pixel_values)
    for number, (features, pooled) in enumerate(
        zip(extract(pictures(7)), extract(pictures(7), pool=True), strict=True)
    ):
        assert torch.equal(torch.tensor(features), expected.last_hidden_state[number : number + 1])
        assert torch.equal(torch.tensor(pooled), expected.pooler_output[number : number + 1])
    tensor = extract(pictures(1)[0], return_tensors=True)
    assert tensor.shape == (1, 16, 32)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_pipeline_gives_the_same_at_every_batch_size(encoder, classifier, batch_size):
    alone = pipeline("image-feature-extraction", model=str(encoder))(pictures(7))
    batched = pipeline("image-feature-extraction", model=str(encoder), batch_size=batch_size)(pictures(7))
    torch.testing.assert_close(torch.tensor(batched), torch.tensor(alone), rtol=0, atol=5e-6)
    guess = pipeline("image-classification", model=str(classifier), function_to_apply="none")
    batched, alone = (
        [{entry["label"]: entry["score"] for entry in result} for result in guess(pictures(7), batch_size=size)]
        for size in (batch_size, 1)
    )
    assert batched == [pytest.approx(scores, abs=1e-5) for scores in alone]


def test_the_classification_pipeline_names_the_classes_of_the_configuration(classifier, pixel_values):
    results = pipeline("image-classification", model=str(classifier))(pictures(7))
    probabilities = LDAEForImageClassification.from_pretrained(classifier)(pixel_values).logits.softmax(dim=-1)
    for result, expected in zip(results, probabilities, strict=True):
        found = {entry["label"]: entry["score"] for entry in result}
        assert found == {LABELS[number]: pytest.approx(expected[number].item()) for number in LABELS}
        assert result[0]["score"] >= result[1]["score"]
    assert len(pipeline("image-classification", model=str(classifier))(pictures(1)[0], top_k=1)) == 1


def test_a_pipeline_takes_a_model_and_a_processor_too(encoder):
    model, processor = AutoModel.from_pretrained(encoder), AutoImageProcessor.from_pretrained(encoder)
    given = pipeline("image-feature-extraction", model=model, image_processor=processor)
    assert given(pictures(1)) == pipeline("image-feature-extraction", model=str(encoder))(pictures(1))


# ---- the batch


def test_the_features_of_an_image_do_not_depend_on_its_batch_mates(encoder, pixel_values):
    """fp32, one thread: bit for bit. More threads may share out the work otherwise: a few units in the last place."""
    model = LDAEModel.from_pretrained(encoder)
    batch = model(pixel_values).last_hidden_state
    strangers = pixel_values.clone()
    strangers[1:] = 100 * torch.randn(6, 3, 16, 16)
    assert torch.equal(model(strangers).last_hidden_state[0], batch[0])
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.equal(model(pixel_values[order]).last_hidden_state, batch[order])
    for size in (1, 2, 5):
        torch.testing.assert_close(model(pixel_values[:size]).last_hidden_state, batch[:size], rtol=0, atol=5e-6)


def test_a_classifiers_logits_do_not_depend_on_batch_mates_either(classifier, pixel_values):
    model = LDAEForImageClassification.from_pretrained(classifier)
    alone = torch.cat([model(image[None]).logits for image in pixel_values])
    torch.testing.assert_close(model(pixel_values).logits, alone, rtol=0, atol=5e-6)


# ---- from a folder to another class, precision or device


def test_an_encoder_gets_a_head_of_the_asked_size_and_keeps_its_weights(encoder, tmp_path):
    model, info = AutoModelForImageClassification.from_pretrained(encoder, num_labels=5, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"batch_norm", "classifier"}
    assert model.classifier.out_features == model.config.num_labels == len(model.config.id2label) == 5
    for name, value in LDAEModel.from_pretrained(encoder).state_dict().items():
        assert torch.equal(model.ldae.state_dict()[name], value), name
    model.save_pretrained(tmp_path)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is LDAEForImageClassification
    for name, value in LDAEModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(model.ldae.state_dict()[name], value), name
    with pytest.raises(ValueError, match="an encoder has no decoder"):
        AutoModelForPreTraining.from_pretrained(encoder)


@pytest.mark.parametrize(
    "how", [dict(device_map="cpu"), dict(low_cpu_mem_usage=True), dict(attn_implementation="eager")]
)
def test_ways_of_loading_do_not_change_the_features(encoder, pixel_values, how):
    expected = AutoModel.from_pretrained(encoder)(pixel_values).last_hidden_state
    features = AutoModel.from_pretrained(encoder, **how)(pixel_values).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=0, atol=0 if "attn_implementation" not in how else 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_is_the_callers_choice_and_the_basis_stays_in_fp32(encoder, pixel_values, dtype):
    expected = AutoModel.from_pretrained(encoder)(pixel_values).last_hidden_state.double()
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    for model in (AutoModel.from_pretrained(encoder, dtype=dtype), AutoModel.from_pretrained(encoder).to(dtype)):
        features = model(pixel_values.to(dtype)).last_hidden_state
        assert model.dtype == features.dtype == dtype
        assert (features.double() - expected).abs().max() < tolerance * expected.abs().max()
    loaded = AutoModel.from_pretrained(encoder, dtype=dtype)
    assert {buffer.dtype for buffer in loaded.tokenizer.buffers()} == {torch.float32}
    assert AutoModel.from_pretrained(encoder, dtype=dtype).config.dtype == dtype


def test_half_of_a_classifier_still_classifies(classifier, pixel_values):
    expected = LDAEForImageClassification.from_pretrained(classifier)(pixel_values).logits
    logits = LDAEForImageClassification.from_pretrained(classifier).half()(pixel_values.half()).logits
    assert logits.dtype == torch.float16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_model_compiles_as_one_graph(encoder, pixel_values, backend):
    model = AutoModel.from_pretrained(encoder)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


def test_a_pretraining_checkpoint_loads_as_each_of_the_classes(tmp_path, pixel_values):
    model = tiny_model(tiny_processor())
    model.save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is LDAEForPreTraining
    expected = model.ldae(pixel_values).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(pixel_values).last_hidden_state, expected)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(classifier.ldae(pixel_values).last_hidden_state, expected)


# ---- Trainer


class Brightness(Dataset):
    """Half of the pictures are darkened; which ones is what a classifier shall tell."""

    def __init__(self, encoder, count: int = 32):
        processor = LDAEImageProcessor.from_pretrained(encoder)
        pixel_values = processor(pictures(count, seed=3), return_tensors="pt")["pixel_values"]
        self.labels = torch.arange(count) % 2
        self.pixel_values = pixel_values - (1 - self.labels)[:, None, None, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def fine_tune(encoder, output_dir, resume: bool = False, batch_norm=None, **settings):
    """A Trainer after its training; its losses are in `trainer.state.log_history`."""
    torch.manual_seed(0)
    names = dict(id2label=LABELS, label2id={name: number for number, name in LABELS.items()})
    arguments = dict(
        output_dir=str(output_dir),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    model = AutoModelForImageClassification.from_pretrained(encoder, **names)
    model.batch_norm = batch_norm or model.batch_norm
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(arguments | settings)),
        train_dataset=Brightness(encoder),
        eval_dataset=Brightness(encoder, 16),
        processing_class=AutoImageProcessor.from_pretrained(encoder),
        compute_metrics=lambda result: {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_fine_tunes_predicts_and_keeps_the_best_in_a_folder_that_a_pipeline_loads(encoder, tmp_path):
    keep = dict(eval_strategy="steps", save_strategy="steps", eval_steps=5, save_steps=5, load_best_model_at_end=True)
    trainer = fine_tune(encoder, tmp_path / "run", metric_for_best_model="accuracy", label_names=["labels"], **keep)
    history = losses(trainer)
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    predictions = trainer.predict(Brightness(encoder, 16))
    assert predictions.predictions.shape == (16, 2)  # logits, and nothing else
    assert predictions.metrics["test_accuracy"] == trainer.state.best_metric > 0.9

    trainer.save_model(tmp_path / "best")
    saved = json.loads((tmp_path / "best" / "config.json").read_text())
    assert saved["id2label"] == {"0": "dark", "1": "bright"}
    assert saved["architectures"] == ["LDAEForImageClassification"]
    again = LDAEForImageClassification.from_pretrained(tmp_path / "best")
    AutoImageProcessor.from_pretrained(tmp_path / "best").encode(pictures(1))
    again.ldae.check_processor(LDAEImageProcessor.from_pretrained(tmp_path / "best"))
    logits = again(Brightness(encoder, 16).pixel_values).logits
    torch.testing.assert_close(logits, torch.tensor(predictions.predictions), rtol=0, atol=1e-5)
    labels = {
        entry["label"] for entry in pipeline("image-classification", model=str(tmp_path / "best"))(pictures(1)[0])
    }
    assert labels == {"dark", "bright"}


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_ends(encoder, tmp_path):
    whole = fine_tune(encoder, tmp_path / "whole", max_steps=6, save_strategy="no")
    fine_tune(encoder, tmp_path / "parts", max_steps=6, save_steps=3, save_strategy="steps")
    for folder in (tmp_path / "parts").glob("checkpoint-6"):
        folder.rename(tmp_path / "thrown away")
    resumed = fine_tune(encoder, tmp_path / "parts", max_steps=6, save_strategy="no", resume=True)
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    ours, theirs = (trainer.model.state_dict() for trainer in (resumed, whole))
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_accumulated_gradients_train_as_the_whole_batch_does(encoder, tmp_path):
    """Without the head's BatchNorm, whose statistics are those of the batches that it sees."""
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        layout = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        runs.append(
            fine_tune(encoder, tmp_path, batch_norm=torch.nn.Identity(), max_steps=4, save_strategy="no", **layout)
        )
    whole, parts = runs
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        dict(label_smoothing_factor=0.1),
        dict(bf16=True),
        dict(gradient_checkpointing=True),
        dict(weight_decay=0.05, warmup_steps=2, lr_scheduler_type="cosine", max_grad_norm=1.0),
        dict(dataloader_drop_last=True, eval_strategy="steps", eval_steps=10),
    ],
)
def test_the_usual_settings_of_trainer_work(encoder, tmp_path, settings):
    history = losses(fine_tune(encoder, tmp_path, save_strategy="no", **settings))
    assert len(history) == 20
    assert sum(history[-5:]) < 0.8 * sum(history[:5])
