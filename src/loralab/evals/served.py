"""Answers that a vLLM server writes in the policy's name: before each batch it is handed the adapter, and nothing else.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK --logprobs-mode processed_logprobs

The server holds the base; what travels is a PEFT folder of a few megabytes, which the server reads itself, so both see the same
files. Each adapter has a name and a folder of its own, used once: of one that is loaded again under its old name or path, a
server goes on using what it computed with the old weights (vLLM's own warning). The interface is that of vLLM 0.33.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.errors import EvaluationError
from loralab.evals.generate import stop_tokens
from loralab.evals.sampling import Sampling
from loralab.evals.written import Answer, Ended, Prompt, Stops, cut, text_behind

TIMEOUT_S = 600.0
"""Longest wait for one prompt's answers."""
AT_ONCE = 64
"""Prompts asked at the same time; the server decides how many it works on."""
HOT, APART = 100.0, 0.5
"""A temperature at which all tokens are about as likely, and by how much (nats) the likeliest must then be less likely than at 1,
where log-probabilities are of what is drawn.
"""
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
"""Said with every request: left out, a server takes them from the model's own generation settings."""
GOODBYE_S = 10.0
"""Longest wait for a server to give up an adapter."""
_ALLOW = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and --enable-lora"
_SEE = "see what the server printed; it must see, and may read, this machine's temporary folder (TMPDIR)"
_DIRECT = build_opener(ProxyHandler({}))
"""Opens addresses without the proxies of the environment: servers are near."""


class Choice(NamedTuple):
    """An answer as a server gives it: tokens, what they were drawn with, how it ended, the likeliest first token's log p."""

    tokens: list[int]
    log_probs: list[float]
    ended: Ended
    likeliest: float


class Server:
    """A vLLM server, by its HTTP interface. Its key, if it has one, is taken from VLLM_API_KEY, where vLLM takes it from too.

    Args:
        url: such as http://localhost:8000.
        timeout: longest wait for an answer, in seconds.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT_S) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout

    def base(self) -> str:
        """Give the name under which the base is served. Raises EvaluationError where nothing is."""
        found = self._call("/v1/models")
        with self._understood():
            bases = [model["id"] for model in found["data"] if not model.get("parent")]
        if not bases:
            raise EvaluationError("the server serves no model", where=self.url, fix="start it with the run's base")
        return str(bases[0])

    def load(self, name: str, folder: Path) -> None:
        """Have a PEFT folder served under a name."""
        self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        """Give a name up."""
        self._call("/v1/unload_lora_adapter", {"lora_name": name}, min(self.timeout, GOODBYE_S))

    def complete(self, **wanted: Any) -> list[Choice]:
        """Have one prompt continued; a choice for each answer, in order."""
        found = self._call("/v1/completions", NEUTRAL | wanted)
        with self._understood():
            return [_choice(each) for each in sorted(found["choices"], key=lambda each: int(each["index"]))]

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Refuse a reply of another shape."""
        try:
            yield
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            what = f"the server's reply cannot be understood: {type(error).__name__} {error}"
            fix = "take a vLLM server that knows `return_token_ids` and gives log-probabilities"
            raise EvaluationError(what, where=self.url, fix=fix) from None

    def _call(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            with _DIRECT.open(Request(self.url + path, data, headers), timeout=timeout or self.timeout) as response:
                text = response.read().decode()
        except HTTPError as error:
            said = _said(error)
            fix = _ALLOW if "load_lora_adapter" in path and said.endswith("Not Found") else _SEE
            raise EvaluationError(f"the server refuses: {said}", where=self.url + path, fix=fix) from None
        except (URLError, TimeoutError, HTTPException, OSError, ValueError) as error:
            fix = (
                "start the server as objective.server says, or drop it; a resumed run goes on from its last checkpoint"
            )
            raise EvaluationError(f"no answer: {error}", where=self.url + path, fix=fix) from None
        try:
            return json.loads(text)
        except ValueError:
            return {"text": text}  # loading an adapter is answered in words


def _said(error: HTTPError) -> str:
    """Give what a server says of a request that it refuses."""
    with suppress(ValueError, KeyError, TypeError, OSError, HTTPException):
        return f"{error.code}, {json.loads(error.read().decode(errors='replace'))['error']['message']}"
    return f"{error.code} {error.reason}"


def _choice(found: dict[str, Any]) -> Choice:
    """Read one answer of a reply; raises ValueError and its like where it is not whole."""
    told, tops = found["logprobs"]["token_logprobs"], found["logprobs"].get("top_logprobs") or [{}]
    tokens = found.get("token_ids") or []
    if found["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"finish_reason {found['finish_reason']!r}")
    if None in told or (tokens and len(tokens) != len(told)):
        raise ValueError(f"{len(tokens)} token_ids, {len(told)} token_logprobs")
    by_text = isinstance(found.get("stop_reason"), str)
    ended: Ended = "limit" if found["finish_reason"] == "length" else "text" if by_text else "stop"
    return Choice(tokens, [float(each) for each in told], ended, max((tops[0] or {}).values(), default=-inf))


class ServedWriter:
    """Writes answers to prompts as a `Writer` does, on a server that wears the policy's adapter.

    Not bit for bit what a `Writer` writes: the server computes with other kernels, and draws other random numbers. Each answer
    comes with the log-probabilities that it was drawn with, so that training can account for the difference.

    Args:
        server: that holds the base.
        save: writes the adapter of the policy as it is now into a folder (`Method.save`).
        model: the policy; its settings tell where answers end.
        tokenizer: of the model.
    """

    def __init__(
        self, server: Server, save: Callable[[Path], None], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.server, self.save, self.tokenizer = server, save, tokenizer
        self.stops = Stops(stop_tokens(model, tokenizer), tokenizer)

    def check(self, prompt: Prompt, temperature: float) -> None:
        """Prove on a prompt that the server loads adapters, and says what it draws with at this temperature.

        Raises:
            EvaluationError: it cannot be reached, does not load adapters, or tells log-probabilities from before temperature.
        """
        with self._adapter():
            pass
        if temperature == 1:
            return
        ask = partial(self.server.complete, model=self.server.base(), prompt=prompt.tokens, max_tokens=1, logprobs=1)
        plain, flat = (ask(temperature=heat, top_p=1.0, top_k=0)[0].likeliest for heat in (1.0, HOT))
        if not plain - flat >= APART:
            what = "the server gives log-probabilities as they are before temperature"
            fix = "start it with --logprobs-mode processed_logprobs, or sample with objective.temperature=1"
            raise EvaluationError(what, where=self.server.url, fix=fix)

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        samples: int = 1,
    ) -> list[list[list[Answer]]]:
        """Answer each prompt as the policy is now.

        Returns:
            For the one view there is, for each prompt, its samples.

        Raises:
            EvaluationError: what the server refuses, or that it does not answer.
        """
        with self._adapter() as name, ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = [
                pool.submit(self._answers, name, prompt, sampling, samples, number)
                for number, prompt in enumerate(prompts)
            ]
            try:
                return [[job.result() for job in jobs]]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # those that wait their turn need not fail one by one
                raise

    @contextmanager
    def _adapter(self) -> Iterator[str]:
        """Have the server wear the policy as it is now, under a name that was never used."""
        name = f"loralab-{uuid.uuid4().hex}"
        with TemporaryDirectory(prefix=name) as folder:
            self.save(Path(folder))
            self.server.load(name, Path(folder))
            try:
                yield name
            finally:
                with suppress(EvaluationError):  # what stays loaded is never asked again, and pushed out in time
                    self.server.unload(name)

    def _answers(self, name: str, prompt: Prompt, sampling: Sampling, samples: int, number: int) -> list[Answer]:
        found = self.server.complete(
            model=name,
            prompt=prompt.tokens,
            n=samples,
            max_tokens=prompt.limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.stream(number, 0) & ((1 << 62) - 1),  # the server counts on from it
            stop=[text for text in prompt.stop_texts if text],
            stop_token_ids=sorted(self.stops.tokens_of(prompt)),
            include_stop_str_in_output=True,
            logprobs=0,
            return_token_ids=True,
        )
        if len(found) != samples or not all(choice.tokens for choice in found):
            what = f"the server gives {sum(bool(choice.tokens) for choice in found)} answers where {samples} were asked for"
            raise EvaluationError(what, where=self.server.url, fix="take a vLLM that knows `return_token_ids`")
        return [self._answer(prompt, choice) for choice in found]

    def _answer(self, prompt: Prompt, choice: Choice) -> Answer:
        text = cut(text_behind(prompt, choice.tokens, self.tokenizer), prompt.stop_texts)
        return Answer(choice.tokens, text, choice.ended, choice.log_probs)
