"""Chat templates for models that bring none: the children of 2023, one .jinja file each.

Each file names its source, and says itself how an answer ends where no EOS token does it:

    {%- set stop_strings = ['\\n### Human'] -%}

What is a special token of the tokenizer among them is stopped at as a token, the rest as text. A
template found here becomes the tokenizer's own: it is trained with, saved and exported like any other.

    >>> name_for("lmsys/vicuna-7b-v1.5"), name_for("Baichuan2-13B-Chat"), name_for("llama-7b")
    ('vicuna', 'baichuan2', None)
"""

from __future__ import annotations

import re
from pathlib import Path

from herdbook.errors import FileError, UnknownName, nearest
from herdbook.tokens import sandbox

FOLDER = Path(__file__).parent

#: what a model's name looks like → its template; the first that is found counts
MODELS = {
    r"openbuddy": "openbuddy",
    r"firefly-(1b4|2b6|bloom|llama|ziya|baichuan|internlm|qwen-7b)": "firefly",
    r"chinese-alpaca-2": "chinese-alpaca-2",
    r"chinese-alpaca": "chinese-alpaca",
    r"chinese-vicuna": "alpaca",
    r"(?<!stable-)vicuna.*v0": "vicuna-v0",
    r"(?<!stable-)vicuna|longchat|wizardlm-(13|30|70)b": "vicuna",
    r"wizardlm-7b": "wizardlm",
    r"expertllama": "expertllama",
    r"koala": "koala",
    r"baize": "baize",
    r"ziya(?!2|-coding|-writing|-reader)|ziya2.*chat": "ziya",
    r"belle-": "belle",
    r"moss.*sft": "moss",
    r"chatglm3(?!.*base)": "chatglm3",
    r"chatglm2": "chatglm2",
    r"chatglm-": "chatglm",
    r"baichuan2.*chat": "baichuan2",
    r"baichuan-.*chat": "baichuan",
    r"internlm2-chat": "internlm2",
    r"internlm-chat-(7b.*v1|20b)": "internlm-1.1",
    r"internlm-chat-7b": "internlm",
    r"rwkv.*raven": "rwkv-raven",
    r"rwkv.*world": "rwkv-world",
    r"dolly-v": "dolly",
    r"chatyuan": "chatyuan",
    r"llama-?2(?!.*chinese).*chat|codellama.*instruct": "llama-2",
    r"llama-?3(?!.*chinese).*(instruct|chat)": "llama-3",
    r"mi(s|x)tral.*instruct": "mistral",
    r"phoenix": "phoenix",
    r"linly|chatflow|chatllama-zh": "linly",
    r"tigerbot.*(sft|chat)": "tigerbot",
    r"yulan-chat": "yulan",
    r"aquilachat2-(7|34)b-16k": "aquila2-16k",
    r"aquilachat2-34b": "aquila2-34b",
    r"aquilachat2-7b": "aquila2",
    r"aquilachat-": "aquila",
    r"bentsao|huatuo(?!.*gpt)": "huatuo",
    r"lawgpt": "lawgpt",
    r"billa-.*sft": "billa",
    r"falcon-(7|40)b-instruct": "falcon",
    r"gpt4all-j": "gpt4all-j",
    r"bloomz": "bloomz",
    r"panda-?llm|^panda-": "panda",
    r"cpm-bee": "cpm-bee",
    r"cama-13b|zhixi": "alpaca-lora",
    r"alpaca|luotuo|wombat|wizardcoder": "alpaca",
}


def shipped() -> list[str]:
    """The names of the templates that come with Herdbook."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def read(name: str) -> str:
    """A template by its name here, or by its file."""
    known = shipped()
    path = FOLDER / f"{name}.jinja" if name in known else Path(name).expanduser()
    if not path.is_file():
        raise UnknownName(
            f"template {name!r}",
            rule="is none that comes with Herdbook, and no file",
            next=nearest(name, known),
        )
    try:
        template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}", rule=f"is no UTF-8: {error}", next="save it as UTF-8") from error
    if "messages" not in template:
        raise FileError(
            f"{path}",
            rule="is no chat template: it does not mention `messages`, the conversation's turns",
            next="see one that is: herd templates vicuna",
        )
    return template


def about(template: str) -> str:
    """The first line of its comment: which models it is for."""
    return template.partition("\n")[0].strip("{#-}. ")


def name_for(model: str) -> str | None:
    """The template of a model of this name."""
    name = re.sub(r"[\s_]+", "-", model.lower().replace("\\", "/").rpartition("/")[2])
    return next((template for look, template in MODELS.items() if re.search(look, name)), None)


def find(*names: str | None) -> str | None:
    """The template for a model that goes by these names."""
    found = (name_for(name) for name in names if name)
    return next((read(template) for template in found if template), None)


def folder_name(folder: Path) -> str:
    """What a model's folder is called; in the hub's cache (models--org--name/snapshots/hash) as there."""
    folder = folder.absolute()
    return (folder.parent.parent if folder.parent.name == "snapshots" else folder).name


def stop_strings(template: str | None) -> tuple[str, ...]:
    """What ends an answer besides the EOS token, as the template itself says."""
    said = sandbox.constant(template, "stop_strings") if template else None
    found = said if isinstance(said, list) else []
    return tuple(one for one in found if isinstance(one, str) and one)
