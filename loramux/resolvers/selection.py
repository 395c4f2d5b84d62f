"""Which modules an adapter's config changes, and how: by LoRA, by whole tables, or by rows of tables.

Tables are the token embedding and the output head. A head that is tied to the embedding is treated
as PEFT treats it: LoRA and whole tables stay apart unless `ensure_weight_tying` is set, rows always
go to both, unless the config gives each its own.

Source: PEFT 0.21, `_check_tied_modules` (`peft/tuners/tuners_utils.py`), `_add_targets_to_tie` and
`_add_modules_to_save_to_tie` (`peft/tuners/lora/model.py`), `set_additional_trainable_modules`
(`peft/utils/other.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from loramux.engine.types import LoraSite
from loramux.resolvers.module_patterns import names_of, selected_modules, targets_last_name
from loramux.resolvers.peft_config import LoraSettings
from loramux.resolvers.refusal import config_refused, shown


class TokenRows(NamedTuple):
    """Rows of a table that the adapter replaces."""

    token_ids: list[int]
    source: str  # module under whose name the rows are stored


class Selection(NamedTuple):
    """What an adapter's config changes."""

    lora: list[str]  # modules with A and B, in the base model's order
    full: list[str]  # tables that are replaced
    rows: dict[str, TokenRows]  # table -> its replaced rows


def select(settings: LoraSettings, sites: Mapping[str, LoraSite]) -> Selection:
    """Apply the config to the base model's modules.

    Raises:
        AdapterIncompatible: a regular expression is invalid or takes too long, or the config
            names what cannot be replaced, or one table in two ways.
    """
    full = _replaced(settings, sites)
    rows = _rows(settings, sites)
    lora = selected_modules(settings, sites)
    if settings.ensure_weight_tying:
        tied = _tied_tables(sites)
        # As in PEFT, the fields are looked at in this order, and only one of them is tied.
        if full & tied:
            full |= tied
        elif targets_last_name(settings, tied):
            lora |= tied
    lora -= full
    for table, own in rows.items():
        _check_rows_alone(table, own, full, lora, settings)
    return Selection(
        [module for module in sites if module in lora],
        [module for module in sites if module in full],
        {module: rows[module] for module in sites if module in rows},
    )


def _check_rows_alone(
    table: str, rows: TokenRows, full: set[str], lora: set[str], settings: LoraSettings
) -> None:
    """PEFT can put plain LoRA on a head whose rows come from the embedding, and nothing else on rows."""
    other = ""
    if table in full:
        other = "modules_to_save"
    elif table in lora and rows.source == table:
        other = "target_modules"
    elif table in lora and settings.use_dora:
        other = "use_dora"
    if other:
        raise config_refused(
            "trainable_token_indices", f"and {other} both change {table}; PEFT cannot run that either"
        )


def _replaced(settings: LoraSettings, sites: Mapping[str, LoraSite]) -> set[str]:
    tables = set()
    for name in settings.modules_to_save:
        tables.add(_table("modules_to_save", name, sites))
    return tables


def _table(field: str, name: str, sites: Mapping[str, LoraSite]) -> str:
    """The one table that `name` means; as in PEFT, a name may be the end of a path."""
    found = [module for module in sites if name in names_of(module)]
    if len(found) != 1 or not sites[found[0]].is_table:
        tables = [module for module, site in sites.items() if site.is_table]
        raise config_refused(
            field, f"names {shown(name)}, which is not supported: only {_listed(tables)} can be replaced"
        )
    return found[0]


def _rows(settings: LoraSettings, sites: Mapping[str, LoraSite]) -> dict[str, TokenRows]:
    field = "trainable_token_indices"
    rows: dict[str, TokenRows] = {}
    for name, indices in settings.token_rows.items():
        table = _table(field, name, sites)
        if table in rows:
            raise config_refused(field, f"names {table} twice")
        _check_vocabulary(field, indices, sites[table].table_shape[0])
        rows[table] = TokenRows(indices, table)
    return _with_tied_head(settings, rows, sites)


def _check_vocabulary(field: str, indices: list[int], vocabulary: int) -> None:
    beyond = [index for index in indices if not 0 <= index < vocabulary]
    if beyond:
        raise config_refused(
            field,
            f"names token {shown(max(beyond))}, but the base model has a vocabulary of {vocabulary} tokens:"
            " adapters that add tokens are not supported",
        )


def _with_tied_head(
    settings: LoraSettings, rows: dict[str, TokenRows], sites: Mapping[str, LoraSite]
) -> dict[str, TokenRows]:
    tied = _tied_tables(sites)
    embedding = next((table for table in tied if sites[table].kind == "embedding"), None)
    if embedding is None or embedding not in rows:
        return rows
    (head,) = tied - {embedding}
    if head not in rows or rows[head].token_ids == rows[embedding].token_ids:
        return {**rows, head: rows[embedding]}
    if settings.ensure_weight_tying:
        raise config_refused(
            "trainable_token_indices",
            f"names other tokens for {head} than for {embedding}, and ensure_weight_tying wants them equal",
        )
    return rows


def _tied_tables(sites: Mapping[str, LoraSite]) -> set[str]:
    """Embedding and head, if the head shares the embedding's weight."""
    if not any(site.is_tied for site in sites.values()):
        return set()
    return {module for module, site in sites.items() if site.is_table}


def _listed(names: Collection[str]) -> str:
    return " and ".join(names) if names else "nothing in this base model"
