"""The offline API: a model and its adapters in the caller's process, without a server.

    llm = LLM("path/to/model", enable_lora=True)
    sql = LoRARequest("sql", 1, "path/to/adapter")
    outputs = llm.generate(["Hello"], SamplingParams(max_tokens=32), lora_request=sql)

It drives the same engine as the server, by its own steps and without sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import msgspec
from tqdm import tqdm

from loramux.engine.config import EngineConfig
from loramux.engine.core import Engine
from loramux.engine.errors import InvalidConfig, InvalidRequest
from loramux.engine.types import Request, TokenLogprobs
from loramux.outputs import CompletionOutput, Logprob, LoRARequest, RequestOutput
from loramux.resolvers.inspect import inspect_adapter
from loramux.server.chat_template import ChatTemplate, find_chat_template, read_chat_template
from loramux.server.choice import ChoiceStream, Delta
from loramux.server.generation_config import read_generation_config
from loramux.server.model_folder import find_model_folder
from loramux.server.plain_text import ControlTokenGuard
from loramux.server.sampling_params import (
    SamplingParams,
    check_token_ids,
    seed_of_choice,
    to_token_sampling,
)
from loramux.server.structured import StructuredOutputsParams
from loramux.server.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

_T = TypeVar("_T")

_ENGINE_FIELDS: Final = frozenset(EngineConfig.__struct_fields__) - {"model", "tokenizer"}


class LLM:
    """A base model with adapters, called directly."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        chat_template: str | None = None,
        **engine_options: Any,
    ) -> None:
        """Load the model.

        Args:
            model: a Hugging Face folder, or a Hub id where a hub is reachable.
            tokenizer: a folder with another tokenizer.
            revision: branch, tag or commit of a Hub id.
            chat_template: a file or a Jinja text; None = the model's own.
            engine_options: fields of `EngineConfig`, such as `enable_lora`, `max_loras`,
                `max_lora_rank`, `dtype`, `max_model_len`, `max_num_seqs`.

        Raises:
            InvalidConfig: an option is unknown or has a wrong value.
            UnsupportedModel: the model cannot be served.
        """
        unknown = sorted(engine_options.keys() - _ENGINE_FIELDS)
        if unknown:
            raise InvalidConfig(
                f"unknown option {unknown[0]!r}; known are {', '.join(sorted(_ENGINE_FIELDS))}",
                param=unknown[0],
            )
        folder = find_model_folder(
            model, revision=revision, with_weights=engine_options.get("load_format") != "dummy"
        )
        tokenizer_folder = Path(tokenizer).expanduser() if tokenizer else folder
        self._tokenizer = Tokenizer.from_folder(tokenizer_folder)
        written = read_generation_config(folder)
        own_eos = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        self._eos_token_ids = list(dict.fromkeys(own_eos + written.eos_token_ids))
        self._defaults = written.defaults
        source = read_chat_template(chat_template) if chat_template else find_chat_template(tokenizer_folder)
        self._template = ChatTemplate(source, self._tokenizer.special_tokens) if source else None
        self._guard = ControlTokenGuard(self._tokenizer)
        self._engine = Engine(
            _engine_config(str(folder), {**engine_options, "tokenizer": str(tokenizer_folder)})
        )
        self._adapters: dict[Path, str] = {}  # folder -> digest
        self._num_requests = 0

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling values that the model's own generation config asks for."""
        return SamplingParams(**self._defaults)

    def load_adapter(self, lora_request: LoRARequest) -> str:
        """Read an adapter before its first use; returns its content digest.

        Raises:
            AdapterNotFound, AdapterIncompatible: it cannot be served; nothing else is affected.
            InvalidConfig: the model was loaded without `enable_lora=True`.
        """
        path = Path(lora_request.lora_path).expanduser().resolve()
        if path not in self._adapters:
            info = self._engine.info
            if not info.enable_lora:
                raise InvalidConfig(
                    "LoRA is not enabled: use LLM(..., enable_lora=True)", param="enable_lora"
                )
            spec = inspect_adapter(path, info.lora_sites, max_lora_rank=info.max_lora_rank)
            self._engine.load_adapter(spec)
            self._adapters[path] = spec.digest
        return self._adapters[path]

    def unload_adapter(self, lora_request: LoRARequest) -> None:
        """Forget an adapter and free its memory; its folder is read again at the next use.

        Raises:
            AdapterNotFound: it is not loaded.
        """
        digest = self._adapters.pop(Path(lora_request.lora_path).expanduser().resolve(), "")
        if digest not in self._adapters.values():
            self._engine.unload_adapter(digest)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch.

        Args:
            prompts: one or several, each a text, token ids, `{"prompt": text}` or
                `{"prompt_token_ids": ids}`.
            sampling_params: one for all, or one a prompt; None = the model's own defaults.
            use_tqdm: show a progress bar.
            lora_request: the adapter of all prompts, or one (or None = base) a prompt.

        Returns:
            One output a prompt, in their order.

        Raises:
            InvalidRequest: a prompt or a parameter cannot be served, or list lengths differ.
            AdapterNotFound, AdapterIncompatible: an adapter cannot be served.
        """
        parsed = [self._parse(prompt) for prompt in _as_list(prompts)]
        params = _one_each(
            "sampling_params", sampling_params or SamplingParams(**self._defaults), len(parsed)
        )
        adapters = _one_each("lora_request", lora_request, len(parsed))
        digests = [self.load_adapter(adapter) if adapter else None for adapter in adapters]
        calls = [
            _Call(self._next_id(), *prompt, p, adapter)
            for prompt, p, adapter in zip(parsed, params, adapters, strict=True)
        ]
        requests = [
            request
            for call, digest in zip(calls, digests, strict=True)
            for request in self._requests(call, digest)
        ]
        self._run(calls, requests, use_tqdm=use_tqdm)
        return [call.output(self._tokenizer) for call in calls]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the chat template; otherwise like `generate`.

        Control tokens that are written in a message are plain text.

        Raises:
            InvalidRequest: as `generate`; also when the model has no chat template.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; pass chat_template=", param="messages")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", messages if several else [messages])
        prompts: list[Prompt] = []
        for conversation in conversations:
            hidden = self._guard.open()
            text = self._template.render(
                hidden.hide(conversation),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                options=chat_template_kwargs,
            )
            ids = self._guard.encode(text, hidden, add_special_tokens=False)
            prompts.append({"prompt": hidden.show(text), "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def _next_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text, token ids) of one prompt."""
        text: str | None = None
        if isinstance(prompt, Mapping):
            text = prompt.get("prompt")
            prompt = prompt.get("prompt_token_ids") or text or ""
        if isinstance(prompt, str):
            text, ids = prompt, self._tokenizer.encode(prompt)
        else:
            ids = list(cast("Sequence[int]", prompt))
        if not ids:
            raise InvalidRequest("the prompt must hold at least 1 token", param="prompts")
        check_token_ids("prompts", ids, self._engine.info.vocab_size)
        return text, ids

    def _requests(self, call: _Call, digest: str | None) -> list[Request]:
        sampling = to_token_sampling(
            call.params,
            self._tokenizer,
            self._engine.info,
            prompt_len=len(call.token_ids),
            eos_token_ids=self._eos_token_ids,
        )
        return [
            Request(
                request_id=f"{call.request_id}-{index}",
                prompt_token_ids=call.token_ids,
                sampling=msgspec.structs.replace(sampling, seed=seed_of_choice(sampling.seed, index)),
                adapter=digest,
            )
            for index in range(call.params.n)
        ]

    def _run(self, calls: list[_Call], requests: list[Request], *, use_tqdm: bool) -> None:
        streams = {
            f"{call.request_id}-{index}": (
                call.choices[index],
                ChoiceStream(index, call.token_ids, call.params, self._tokenizer),
            )
            for call in calls
            for index in range(call.params.n)
        }
        try:
            for request in requests:
                self._engine.add_request(request)
            with tqdm(total=len(requests), desc="sequences", unit="seq", disable=not use_tqdm) as bar:
                while self._engine.has_work():
                    for output in self._engine.step():
                        choice, stream = streams[output.request_id]
                        delta = stream.add(output)
                        choice.join(delta)
                        if delta.finish_reason is None:
                            continue
                        bar.update()
                        if output.finish_reason is None:  # a stop string ended it
                            self._engine.abort([output.request_id])
                    for _, error in self._engine.take_failures():
                        raise error
        finally:
            self._engine.abort(list(streams))  # after an error or Ctrl-C, leave nothing behind


class _Call:
    """One prompt while it runs."""

    def __init__(
        self,
        request_id: str,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        adapter: LoRARequest | None,
    ) -> None:
        self.request_id = request_id
        self.text = text
        self.token_ids = token_ids
        self.params = params
        self.adapter = adapter
        self.choices = [Delta(index) for index in range(params.n)]

    def output(self, tokenizer: Tokenizer) -> RequestOutput:
        """The finished call in its public form."""
        first = self.choices[0]
        prompt_logprobs = first.prompt_logprobs
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.text,
            prompt_token_ids=self.token_ids,
            prompt_logprobs=(
                None
                if prompt_logprobs is None
                else [None if p is None else _by_token(p, tokenizer) for p in prompt_logprobs]
            ),
            outputs=[self._choice(choice, tokenizer) for choice in self.choices],
            lora_request=self.adapter,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _choice(self, choice: Delta, tokenizer: Tokenizer) -> CompletionOutput:
        wanted = self.params.logprobs is not None
        return CompletionOutput(
            index=choice.index,
            text=choice.text,
            token_ids=choice.token_ids,
            cumulative_logprob=sum(p.logprobs[0] for p in choice.logprobs) if wanted else None,
            logprobs=[_by_token(p, tokenizer) for p in choice.logprobs] if wanted else None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            lora_request=self.adapter,
        )


def _by_token(position: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """One position by token id: the chosen token first, then the best."""
    ranks = [position.rank, *range(1, len(position.token_ids))]
    found: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True):
        found.setdefault(token_id, Logprob(logprob, rank, tokenizer.token_text(token_id)))
    return found


def _engine_config(folder: str, options: Mapping[str, Any]) -> EngineConfig:
    try:
        return msgspec.convert({"model": folder, **options}, EngineConfig)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"engine options: {error}") from None


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt (a text, an object or a list of ids) becomes a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [cast("Sequence[int]", items)]
    return cast("list[Prompt]", items)


def _one_each(name: str, values: _T | Sequence[_T], count: int) -> list[_T]:
    """One value a prompt: a list must have the right length, anything else is repeated."""
    if not isinstance(values, list | tuple):
        return [cast("_T", values)] * count
    if len(values) != count:
        raise InvalidRequest(f"{name} has {len(values)} entries for {count} prompts", param=name)
    return list(values)
