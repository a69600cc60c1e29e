"""How the weights may move. A new method is one file here and one row in `METHODS`."""

from collections.abc import Callable

from loralab.methods.base import Method
from loralab.methods.cola import Cola
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.methods.lora_plus import LoraPlus
from loralab.methods.peft import Peft

METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "lora": Lora,
    "lora_plus": LoraPlus,
    "cola": Cola,
    "peft": Peft,
}

__all__ = ["METHODS", "Method"]
