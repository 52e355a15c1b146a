from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pyvitfast.train import Settings, UserError, resolve
from pyvitfast.train.settings import DIGITS


def test_precedence_is_defaults_recipe_yaml_set_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.1\nepochs: 3\nbatch_size: 20\n")
    found = resolve(file, ["epochs=4", "batch-size=30"], {"batch_size": 40, "seed": None})
    assert (found.lr, found.epochs, found.batch_size) == (0.1, 4, 40)
    assert found.interval == DIGITS["interval"] != Settings().interval
    assert found.warmup_epochs == Settings().warmup_epochs


def test_recipe_of_digits_is_not_used_for_other_data() -> None:
    found = resolve(flags={"data": "some/folder", "model": "vit_tiny_patch16_224"})
    assert found.lr == Settings().lr
    assert found.group_sizes is None
    with pytest.raises(UserError, match=r"--model is needed with --data some/folder"):
        resolve(flags={"data": "some/folder"})


def test_group_sizes_of_the_micro_model_are_not_used_for_another_model() -> None:
    assert resolve(flags={"model": "vit_tiny_patch16_224"}).group_sizes is None


def test_yaml_numbers_without_a_dot_are_numbers() -> None:
    # YAML 1.1 reads 1e-3 as a string.
    assert resolve(None, ["lr=1e-3"]).lr == 1e-3
    assert resolve(None, ["clip_grad=1"]).clip_grad == 1.0


@given(
    st.fixed_dictionaries(
        {
            "lr": st.floats(1e-6, 1),
            "epochs": st.integers(0, 500),
            "clip_grad": st.none() | st.floats(0.1, 10),
            "amp": st.sampled_from(["no", "bf16"]),
            "group_sizes": st.none() | st.dictionaries(st.sampled_from(["head", "mlp"]), st.integers(1, 8)),
        }
    )
)
def test_round_trip_through_yaml(values: dict[str, object]) -> None:
    settings = Settings.from_dict(values)
    assert Settings.from_dict(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epochs", -1, "--epochs must be at least 0, got -1"),
        ("epochs", 1.5, "--epochs must be a whole number, got 1.5"),
        ("epochs", True, "--epochs must be a whole number, got True"),
        ("batch_size", 0, "--batch-size must be at least 1, got 0"),
        ("lr", -0.1, "--lr must be a positive number, got -0.1"),
        ("lr", "fast", "--lr must be a number, got 'fast'"),
        ("lr", float("nan"), "--lr must be a number, got nan"),
        ("lr", "inf", "--lr must be a number, got inf"),
        ("target", 1.0, "--target must be a fraction between 0 and 1"),
        ("target", 0, "--target must be a fraction between 0 and 1"),
        ("imbalance", 0.5, "--imbalance must be at least 1"),
        ("smoothing", 1, "--smoothing must be at least 0 and below 1"),
        ("hflip", 2, "--hflip must be between 0 and 1"),
        ("amp", "bf61", "--amp must be one of no, bf16, fp16, got 'bf61'. Did you mean 'bf16'"),
        ("budget", "mac", "--budget must be one of macs, params, latency, got 'mac'. Did you mean 'macs'"),
        ("opt", "adamww", "--opt must be a known name, got 'adamww'. Did you mean"),
        ("sched", "linear", "--sched must be one of cosine"),
        ("preset", "x", "--preset must be one of paper, nvit_repo"),
        ("pretrained", "yes", "--pretrained must be true or false"),
        ("model", 3, "--model must be text"),
        ("group_sizes", {"tail": 2}, "--group-sizes must be whole numbers"),
        ("group_sizes", 4, "--group-sizes must be a mapping"),
        ("clip_grad", 0, "--clip-grad must be a positive number"),
        ("img_size", 0, "--img-size must be at least 1"),
    ],
)
def test_bad_value_is_named(key: str, value: object, words: str) -> None:
    with pytest.raises(UserError) as error:
        Settings.from_dict({key: value})
    assert words in str(error.value)


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set: unknown key 'epoch'. Did you mean 'epochs'"):
        resolve(None, ["epoch=3"])
    file = tmp_path / "c.yaml"
    file.write_text("finetune_epoch: 3\n")
    with pytest.raises(UserError, match=r"unknown key 'finetune_epoch'. Did you mean 'finetune_epochs'"):
        resolve(file)


@pytest.mark.parametrize("text", ["lr: [1", "- a\n- b\n", "just text", "a: b: c"])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml (is not valid YAML|must hold lines of `key: value`)"):
        resolve(file)


def test_empty_yaml_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("")
    assert resolve(file) == resolve()


def test_missing_yaml_and_bad_set() -> None:
    with pytest.raises(UserError, match=r"--config nowhere.yaml: no such file"):
        resolve(Path("nowhere.yaml"))
    with pytest.raises(UserError, match=r"must have the form key=value"):
        resolve(None, ["lr"])
    with pytest.raises(UserError, match=r"is not valid YAML"):
        resolve(None, ["lr=[1"])
