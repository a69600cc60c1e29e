"""A server as vLLM's is, as far as it is asked: stock PEFT on the base in this process, behind the same HTTP interface."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Stand:
    """What is served, and what was asked of it.

    Attributes:
        key: that is asked for, if any.
        instead: what is answered to a path in place of the truth; None keeps silent until the server ends.
        raw: give log-probabilities as they are before temperature, as vLLM does by default.
        loads: adapters may be loaded.
        refuses: what is answered to whoever wants to load one.
        handed: the tensors of every adapter that was loaded.
        names: under which they were.
        served: names that are served now.
        asked: the requests for answers.
    """

    def __init__(self, base: Path) -> None:
        self.key: str | None = None
        self.instead: dict[str, Any] = {}
        self.refuses: tuple[int, Any] | None = None
        self.ended = Event()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base, self.raw, self.loads, self.lock = base, False, True, Lock()
        self.handed: list[dict[str, torch.Tensor]] = []
        self.names: list[str] = []
        self.folders: list[Path] = []
        self.served: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            adapters = [{"id": name, "parent": "base"} for name in self.served]
            return 200, {"data": [*adapters, {"id": "base", "parent": None}]}
        assert body is not None
        if path == "/v1/load_lora_adapter" and self.refuses is not None:
            return self.refuses
        if path == "/v1/load_lora_adapter" and self.loads:
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            del self.served[body["lora_name"]]
            return 200, "Success: removed"
        if path == "/v1/completions":
            self.asked.append(body)
            if body["model"] not in {"base", *self.served}:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            return 200, {"choices": [self._choice(body, i) for i in reversed(range(body.get("n", 1)))]}
        return 404, {"error": {"message": "Not Found"}}

    def _load(self, name: str, folder: Path) -> tuple[int, Any]:
        if name in self.names or folder in self.folders:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.served[name] = PeftModel.from_pretrained(model, folder).eval()
        self.handed.append(load_file(folder / "adapter_model.safetensors"))
        self.names.append(name)
        self.folders.append(folder)
        return 200, "Success: added"

    @torch.no_grad()
    def _choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        model = self.served.get(body["model"]) or AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        generator = torch.Generator().manual_seed(body.get("seed", 0) + index)
        written: list[int] = []
        log_probs: list[float] = []
        tops: list[dict[str, float]] = []
        reason = None
        while len(written) < body["max_tokens"]:
            logits = model(input_ids=torch.tensor([[*body["prompt"], *written]])).logits[0, -1]
            heat = body["temperature"]
            drawn = torch.log_softmax(logits / (heat or 1e-9), -1)
            written.append(int(torch.multinomial(drawn.exp(), 1, generator=generator)))
            told = torch.log_softmax(logits, -1) if self.raw else drawn
            log_probs.append(float(told[written[-1]]))
            tops.append({"likeliest": float(told.max())})
            if (reason := self._why(body, written)) is not None:
                break
        return {
            "index": index,
            "finish_reason": "length" if reason is None else "stop",
            "stop_reason": reason,
            "token_ids": written if body.get("return_token_ids") else None,
            "logprobs": {"token_logprobs": log_probs, "top_logprobs": tops},
        }

    def _why(self, body: dict[str, Any], written: list[int]) -> int | str | None:
        """Give the token or text that ends an answer."""
        if written[-1] in body.get("stop_token_ids", []):
            return written[-1]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return next((stop for stop in body.get("stop", []) if stop in text), None)


@contextmanager
def serving(base: Path) -> Iterator[tuple[str, Stand]]:
    """Serve a base; gives the server's URL and what it notes."""
    stand = Stand(base)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any] | None) -> None:
            if self.path in stand.instead and stand.instead[self.path] is None:
                stand.ended.wait()
                return
            with stand.lock:
                status, found = stand.answer(self.path, body)
            if self.path in stand.instead:
                status, found = 200, stand.instead[self.path]
            if stand.key and self.headers["Authorization"] != f"Bearer {stand.key}":
                status, found = 401, {"error": "Unauthorized"}
            text = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", stand
        finally:
            stand.ended.set()
            server.shutdown()
