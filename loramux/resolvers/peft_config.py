"""adapter_config.json -> what the LoRA math needs, or a refusal that names the field.

Every field of PEFT's LoraConfig stands in exactly one of three tables below: used here, without
effect once training is over, or refused unless it is off. A fourth table holds what training
programs add to the file. A field that no table knows is refused unless it is off too, since it may
change the math. A test compares the tables with the installed PEFT, so that a new field is noticed.

Source: PEFT 0.21, `peft/tuners/lora/config.py` and `layer.py`.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from loramux.engine.errors import AdapterIncompatible
from loramux.resolvers.refusal import config_refused, shown

MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_PATTERNS: Final = 4096  # one a module is enough; the largest dense models have about 900

HANDLED: Final = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "base_model_name_or_path",
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)

HARMLESS: Final[dict[str, str]] = {
    "task_type": "chooses the class that wraps the model",
    "auto_mapping": "names the base model's class",
    "peft_version": "who wrote the file",
    "revision": "of the base model",
    "inference_mode": "freezes the weights",
    "lora_dropout": "acts in training only",
    "loftq_config": "read only with init_lora_weights=loftq, which is refused",
    "eva_config": "read at initialisation only",
    "corda_config": "read only with init_lora_weights=corda, which is refused",
    "lora_ga_config": "read only with init_lora_weights=lora_ga, which is refused",
    "megatron_core": "read only with megatron_config, which is refused",
    "qalora_group_size": "read only with use_qalora, which is refused",
    "runtime_config": "PEFT ignores it in a file",
}

TRAINERS: Final[dict[str, str]] = {
    "unsloth_fixed": "Unsloth's note that it patched the model's code",
    "modules_to_tie": "PEFT derives it from ensure_weight_tying whenever it loads the adapter",
    "target_modules_to_tie": "PEFT derives it from ensure_weight_tying whenever it loads the adapter",
}

UNSUPPORTED: Final[dict[str, str]] = {
    "lora_bias": "it adds a bias to lora_B",
    "target_parameters": "it adapts parameters that are not linear layers",
    "layer_replication": "it changes the base model's stack of layers",
    "alora_invocation_tokens": "activated LoRA switches the adapter on inside the prompt",
    "megatron_config": "it is for Megatron's parallel layers",
    "use_qalora": "QALoRA pools the layer's input",
    "monteclora_config": "MonteCLoRA samples the weights",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow routes tokens between adapters",
    "kasa_config": "KaSA changes the base weights",
    "velora_config": "VeLoRA stores tensors of its own",
}

# PEFT turns a dict for one of these, even an empty one, into a config object: the feature is on.
_EMPTY_IS_ON: Final = frozenset(
    {"monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "velora_config"}
)

# Initialisations that leave the base model as it is. The others (pissa, olora, corda, loftq,
# lora_ga) subtract the initial B @ A from the base weights, so the adapter fits only that base.
_PLAIN_INITS: Final = ("gaussian", "orthogonal", "eva", "mica")


_EMBEDDING: Final = "embed_tokens"  # where PEFT puts a plain list of trainable_token_indices


class LoraSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of an adapter's config that decide which modules it changes and how much."""

    r: int
    alpha: float
    use_rslora: bool
    target_modules: str | list[str]  # str: a regular expression or "all-linear"
    exclude_modules: str | list[str]
    layers_to_transform: list[int]  # empty = every layer
    layers_pattern: list[str]
    rank_pattern: dict[str, int]  # regular expression -> rank; the first that matches wins
    alpha_pattern: dict[str, float]
    use_dora: bool
    modules_to_save: list[str]  # names of modules that the adapter replaces
    token_rows: dict[str, list[int]]  # name of a table -> its rows that the adapter replaces
    ensure_weight_tying: bool  # what changes a tied embedding changes the head, too
    base_model: str | None

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of B @ A for a module of this rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(config: dict[str, object]) -> LoraSettings:
    """Check every field of a parsed adapter_config.json.

    Raises:
        AdapterIncompatible: a field is missing, has the wrong type, or asks for something that
            cannot be served.
    """
    _check_kind(config)
    _check_features(config)
    settings = LoraSettings(
        r=_rank("r", _required(config, "r")),
        alpha=_number("lora_alpha", _required(config, "lora_alpha")),
        use_rslora=_bool(config, "use_rslora"),
        target_modules=_names("target_modules", _required(config, "target_modules")),
        exclude_modules=_names("exclude_modules", _given(config, "exclude_modules", [])),
        layers_to_transform=_layers(_given(config, "layers_to_transform", [])),
        layers_pattern=_patterns(_given(config, "layers_pattern", [])),
        rank_pattern={
            key: _rank(f"rank_pattern[{shown(key)}]", value) for key, value in _map(config, "rank_pattern")
        },
        alpha_pattern={
            key: _number(f"alpha_pattern[{shown(key)}]", value)
            for key, value in _map(config, "alpha_pattern")
        },
        use_dora=_bool(config, "use_dora"),
        modules_to_save=_string_list(
            "modules_to_save", "a list of names", _given(config, "modules_to_save", [])
        ),
        token_rows=_token_rows(_given(config, "trainable_token_indices", [])),
        ensure_weight_tying=_bool(config, "ensure_weight_tying"),
        base_model=_base_model(config),
    )
    # PEFT keeps lora_A as [r, in_features] and lora_B as [out_features, r] whatever fan_in_fan_out
    # says: the flag only tells how the base weight is stored when the two are merged, and PEFT
    # resets it on nn.Linear, the only kind of layer here. So it is checked and then unused.
    _bool(config, "fan_in_fan_out")
    _check_pairs(settings)
    return settings


def _check_kind(config: dict[str, object]) -> None:
    peft_type = _required(config, "peft_type")
    if peft_type != "LORA":
        raise config_refused("peft_type", f"is {shown(peft_type)}; only 'LORA' can be served")


def _check_features(config: dict[str, object]) -> None:
    bias = config.get("bias")
    if bias is not None and bias != "none":
        raise config_refused(
            "bias",
            f"is {shown(bias)}; only 'none' can be served, since the others change the base model's biases",
        )
    init = config.get("init_lora_weights")
    if not _is_plain_init(init):
        raise config_refused(
            "init_lora_weights",
            f"is {shown(init)}, which changed the base weights in training; save the adapter with"
            " path_initial_model_for_weight_conversion to turn it into plain LoRA",
        )
    for field, value in config.items():
        if field in UNSUPPORTED and not _is_off(field, value):
            raise config_refused(field, f"is {shown(value)}, which is not supported: {UNSUPPORTED[field]}")
        is_known = field in HANDLED or field in HARMLESS or field in TRAINERS or field in UNSUPPORTED
        if not is_known and value:
            name = field if field.isidentifier() else shown(field)
            raise config_refused(name, f"is {shown(value)}: an unknown field, which might change the result")


def _is_plain_init(init: object) -> bool:
    if init is None or isinstance(init, bool):
        return True
    return isinstance(init, str) and init.lower() in _PLAIN_INITS


def _is_off(field: str, value: object) -> bool:
    return value is None or value is False or (not value and field not in _EMPTY_IS_ON)


def _check_pairs(settings: LoraSettings) -> None:
    if isinstance(settings.target_modules, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(settings, field):
                raise config_refused(field, "cannot be used when target_modules is a string")
    if not settings.target_modules:
        raise config_refused("target_modules", "is empty: the adapter changes nothing")
    if settings.layers_pattern and not settings.layers_to_transform:
        raise config_refused("layers_pattern", "needs layers_to_transform beside it")


def _given(config: dict[str, object], field: str, default: object) -> object:
    """The field's value; null counts as absent."""
    value = config.get(field)
    return default if value is None else value


def _required(config: dict[str, object], field: str) -> object:
    value = config.get(field)
    if value is None:
        raise config_refused(field, "is missing")
    return value


def _wrong_type(field: str, expected: str, value: object) -> AdapterIncompatible:
    return config_refused(field, f"must be {expected}, got {shown(value)}")


def _bool(config: dict[str, object], field: str) -> bool:
    value = _given(config, field, False)
    if not isinstance(value, bool):
        raise _wrong_type(field, "true or false", value)
    return value


def _rank(field: str, value: object) -> int:
    if type(value) is not int or value < 1:  # type(): JSON's true is no rank
        raise _wrong_type(field, "an integer of at least 1", value)
    return value


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(field, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):  # 1e999 is valid JSON
        raise _wrong_type(field, "a finite number", value)
    return number


def _names(field: str, value: object) -> str | list[str]:
    if isinstance(value, str):
        return value
    return _string_list(field, "a string or a list of strings", value)


def _patterns(value: object) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return _string_list("layers_pattern", "a string or a list of strings", value)


def _string_list(field: str, expected: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong_type(field, expected, value)
    return value


def _layers(value: object) -> list[int]:
    layers: list[object] = value if isinstance(value, list) else [value]
    numbers = [layer for layer in layers if isinstance(layer, int) and not isinstance(layer, bool)]
    if len(numbers) != len(layers):
        raise _wrong_type("layers_to_transform", "an integer or a list of integers", value)
    return numbers


def _token_rows(value: object) -> dict[str, list[int]]:
    """PEFT's two spellings: the rows of the embedding, or the rows of each named table."""
    field = "trainable_token_indices"
    named = value if isinstance(value, dict) else {_EMBEDDING: value}
    rows = {}
    for name, indices in named.items():
        if not isinstance(indices, list) or not all(type(index) is int for index in indices):
            raise _wrong_type(field, "a list of integers, or an object of such lists", value)
        if len(set(indices)) < len(indices):
            raise config_refused(field, f"names a token of {shown(name)} twice")
        if indices:
            rows[name] = indices
    return rows


def _map(config: dict[str, object], field: str) -> list[tuple[str, object]]:
    value = _given(config, field, {})
    if not isinstance(value, dict):
        raise _wrong_type(field, "an object", value)
    if len(value) > _MAX_PATTERNS:
        raise config_refused(field, f"has {len(value)} entries, more than the limit of {_MAX_PATTERNS}")
    return list(value.items())


def _base_model(config: dict[str, object]) -> str | None:
    value = _given(config, "base_model_name_or_path", None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong_type("base_model_name_or_path", "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, written as an escape
        raise _wrong_type("base_model_name_or_path", "valid Unicode", value) from None
    return value
