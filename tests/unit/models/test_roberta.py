"""RoBERTa against transformers' own: logits, loss, gradients; padding and packs; config.json; files of a directory."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.kit.classifiers import random_roberta
from titan_hd.models.classification import label_of_score, scores_of
from titan_hd.models.head import Targets
from titan_hd.models.hf_files import open_model_weights
from titan_hd.models.registry import flavor_config, parse_hf_config, read_hf_config
from titan_hd.models.roberta import Roberta, with_labels

SMALL = {
    "architectures": ["RobertaForSequenceClassification"],
    "model_type": "roberta",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}
# Both sides are fp32 sums of at most a few hundred terms in an order of their own.
TOLERANCE = 1e-5
LENGTHS = (24, 9, 2)


def theirs(raw: dict, model: Roberta):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    reference = transformers.RobertaForSequenceClassification._from_config(config, attn_implementation="eager")
    missing, unexpected = reference.float().load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not missing
    return reference.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded at the right, and which of them are real."""
    ids = torch.randint(3, 61, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids.where(real, 1), real.long()


@pytest.mark.parametrize("changes", [{}, {"pad_token_id": 0}, {"layer_norm_eps": 0.5}, {"type_vocab_size": 3}])
@torch.no_grad()
def test_logits(changes: dict):
    raw = {**SMALL, **changes}
    model = random_roberta(raw)
    ids, real = batch()
    ids = ids.where(real.bool(), raw["pad_token_id"])
    logits, expected = model(ids, documents=real), theirs(raw, model)(ids, attention_mask=real).logits
    assert logits.shape == expected.shape == (3, 3)
    assert 0.1 < expected.std() < 10.0  # or the tolerance would mean nothing
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert (model(ids) - expected).abs().max() > 1000 * TOLERANCE  # padding that is not masked would be seen


@pytest.mark.parametrize("names", [("a", "b", "c"), ("score",)])
def test_loss_and_gradients(names: tuple[str, ...]):
    config = with_labels(parse_hf_config(SMALL, "x"), names)
    model, (ids, real) = random_roberta(config.hf), batch()
    labels = torch.tensor([2, 0, 1]) if len(names) > 1 else torch.tensor([4.75, -0.5, 3.8])
    reference = theirs(config.hf, model)
    expected = reference(ids, attention_mask=real, labels=labels).loss
    expected.backward()
    numbers = labels if len(names) > 1 else torch.tensor([label_of_score(x) for x in labels.tolist()])
    loss = model(ids, documents=real, targets=Targets(torch.arange(3) * ids.shape[1], numbers)) / 3
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=TOLERANCE)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_packed_sequences_are_as_each_by_itself():
    model, (ids, real) = random_roberta(SMALL), batch()
    alone = model(ids, documents=real)
    row = torch.cat([ids[i, :n] for i, n in enumerate(LENGTHS)] + [torch.full((5,), 1)])[None]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([*LENGTHS, 5]))[None]
    first = torch.tensor([0, LENGTHS[0], LENGTHS[0] + LENGTHS[1]])
    labels = torch.tensor([1, 1, 2])
    loss = model(row, documents=documents, targets=Targets(first, labels))
    expected = torch.nn.functional.cross_entropy(alone, labels, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_padding_may_be_longer_than_the_table():
    """Rows are as long as a multiple of 8, which the number of positions need not be."""
    model = random_roberta({**SMALL, "max_position_embeddings": SMALL["pad_token_id"] + 1 + 21})
    ids = torch.arange(21).remainder(40)[None] + 10
    row = torch.cat([ids, torch.full((1, 3), 1)], 1).repeat(2, 1)
    row[1, 1:] = 1  # 23 of padding
    documents = torch.tensor([21 * [0] + 3 * [1], [0] + 23 * [1]])
    torch.testing.assert_close(model(row, documents=documents)[:1], model(ids))


@pytest.mark.parametrize("keep", [(), ("qkv", "gate_up")])
def test_recomputed_gradients_are_the_same_bits(keep: tuple[str, ...]):
    ids, real = batch()
    found = []
    for recomputed in (False, True):
        model = random_roberta({**SMALL, "hidden_dropout_prob": 0.3}).train()
        for block in model.blocks() if recomputed else ():
            block.recompute(keep, draws=True)
        torch.manual_seed(0)
        model(ids, documents=real, targets=Targets(torch.tensor([0]), torch.tensor([1]))).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_dropout_is_that_of_the_configuration():
    ids, real = batch()
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        model = random_roberta({**SMALL, **none}).train()
        assert not model.config.draws
        assert torch.equal(model(ids, documents=real), model.eval()(ids, documents=real))
        model = random_roberta({**SMALL, **none, key: 0.5}).train()
        assert model.config.draws
        assert not torch.equal(model(ids, documents=real), model.eval()(ids, documents=real))


def test_scores_come_back():
    scores = [0.0, -0.0, 5.0, 2.667, -1e30, 3.5e-20]
    labels = torch.tensor([label_of_score(score) for score in scores])
    assert -100 not in labels.tolist()
    assert torch.equal(scores_of(labels), torch.tensor(scores))


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported; only gelu is"),
            ({"is_decoder": True}, "is_decoder: True is not supported"),
            ({"num_attention_heads": 5}, "num_attention_heads: must divide hidden_size \\(32\\), not 5"),
            ({"max_position_embeddings": 2}, "max_position_embeddings: must be above pad_token_id \\+ 1 = 2"),
            ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: must be a number from 0 to below 1, not 1.0"),
            ({"id2label": {"0": "a", "2": "b"}}, "id2label: must map 0, 1, ... to names that differ"),
            ({"pad_token_id": "x"}, "pad_token_id: must be an id of the vocabulary, not 'x'"),
            (
                {"problem_type": "multi_label_classification"},
                "problem_type: 'multi_label_classification' with 3 label\\(s\\) is not supported; only single_label",
            ),
            ({"problem_type": "regression"}, "problem_type: 'regression' with 3 label\\(s\\) is not supported"),
            (
                {"problem_type": "single_label_classification", "id2label": {"0": "a"}},
                "problem_type: 'single_label_classification' with 1 label\\(s\\) is not supported; only regression is",
            ),
            ({"model_type": "llama"}, "architectures .* and model_type 'llama' contradict each other"),
        ],
    )
    def test_refusals(self, changes: dict, reason: str):
        with pytest.raises(ValueError, match=f"^here: {reason}"):
            parse_hf_config({**SMALL, **changes}, "here")

    @pytest.mark.parametrize("name", ["RobertaForMaskedLM", "RobertaModel"])
    def test_any_head_becomes_a_classifier(self, name: str):
        raw = {key: value for key, value in SMALL.items() if key not in ("id2label", "label2id")}
        config = parse_hf_config({**raw, "architectures": [name]}, "x")
        assert (config.num_labels, config.label_names) == (2, ("0", "1"))
        assert config.hf["architectures"] == ["RobertaForSequenceClassification"]
        assert config.hf["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
        assert parse_hf_config(config.hf, "x") == config
        assert with_labels(config, ["0", "1"]).hf == config.hf, "as a checkpoint remembers them"

    def test_published_sizes(self):
        """124,647,170 and 355,361,794 parameters, as transformers counts them with two classes."""
        for flavor, expected in (("base", 124_647_170), ("large", 355_361_794)):
            with torch.device("meta"):
                model = Roberta(flavor_config("roberta", flavor))
            assert sum(p.numel() for p in model.parameters()) == expected
            assert model.config.max_position_embeddings == 512

    def test_keys_of_unknown_meaning_are_named(self):
        assert parse_hf_config({**SMALL, "magic": 3}, "x").ignored == ("magic",)


class TestFiles:
    def write(self, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
        (folder / "config.json").write_text(json.dumps(SMALL))
        save_file(weights, folder / "model.safetensors")
        return folder

    def test_a_new_head_over_another_ones_encoder(self, tmp_path: Path):
        weights = {name: w for name, w in random_roberta(SMALL).state_dict().items() if "classifier" not in name}
        more = {"lm_head.bias": torch.zeros(61), "roberta.pooler.dense.bias": torch.zeros(32)}
        more["roberta.embeddings.position_ids"] = torch.zeros(1, 34)
        files = open_model_weights(self.write(tmp_path, weights | more), read_hf_config(tmp_path))
        assert {name.partition(".")[0] for name in files.missing} == {"classifier"}
        assert len(files.missing) == 4

    def test_files_of_the_model_without_a_head(self, tmp_path: Path):
        """transformers' RobertaModel writes names without "roberta.", and a pooler."""
        model = random_roberta(SMALL)
        state = {name: w for name, w in model.state_dict().items() if "classifier" not in name}
        weights = {name.removeprefix("roberta."): w for name, w in state.items()}
        folder = self.write(tmp_path, weights | {"pooler.dense.weight": torch.zeros(32, 32)})
        files = open_model_weights(folder, read_hf_config(folder))
        assert {name.partition(".")[0] for name in files.missing} == {"classifier"}
        for name, want in state.items():
            files.read_into(name, out := torch.empty_like(want))
            assert torch.equal(out, want), name
        two = {"first.safetensors": list(weights)[:5], "second.safetensors": list(weights)[5:]}
        (folder / "model.safetensors").unlink()
        for file, names in two.items():
            save_file({name: weights[name] for name in names}, folder / file)
        index = {"weight_map": {name: file for file, names in two.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert open_model_weights(folder, read_hf_config(folder)).missing == files.missing

    def test_a_head_in_part_is_a_fault(self, tmp_path: Path):
        weights = {name: w for name, w in random_roberta(SMALL).state_dict().items() if name != "classifier.dense.bias"}
        folder = self.write(tmp_path, weights)
        with pytest.raises(ValueError, match=r"classifier.dense.bias: is missing"):
            open_model_weights(folder, read_hf_config(folder))

    def test_a_head_with_another_number_of_outputs_is_passed_over(self, tmp_path: Path):
        folder = self.write(tmp_path, random_roberta(SMALL).state_dict())
        config = with_labels(read_hf_config(folder), ["score"])
        assert len(open_model_weights(folder, config).missing) == 4
        assert not open_model_weights(folder, with_labels(config, ["x", "y", "z"])).missing
        (folder / "config.json").write_text(json.dumps({**SMALL, "id2label": {"0": "a", "1": "b"}}))
        with pytest.raises(ValueError, match=r"classifier.out_proj.weight: has shape \[3, 32\], must be \[2, 32\]"):
            open_model_weights(folder, read_hf_config(folder))
