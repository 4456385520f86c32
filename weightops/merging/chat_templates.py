"""Chat templates: by name, as Jinja, or the one that most of several models have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.errors import RecipeError
from weightops.merging.vocabulary import SETTINGS, TEMPLATE
from weightops.support.json_files import read_json

CHAT_TEMPLATES = {
    "alpaca": (
        "{%- set ns = namespace(system='') -%}"
        "{%- for m in messages if m['role'] == 'system' -%}"
        "{%- set ns.system = m['content'] | trim -%}"
        "{%- endfor -%}"
        "{{- ns.system + '\\n\\n' -}}"
        "{%- for m in messages -%}"
        "{%- set heads = {'user': 'Instruction', 'assistant': 'Response', "
        "'user_context': 'Input'} -%}"
        "{%- if m['role'] in heads -%}"
        "{{- '### ' + heads[m['role']] + ':\\n' + m['content'] | trim -}}"
        "{{- '' if loop.last else '\\n\\n' -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}"
        "{{- '\\n\\n### Response:\\n' -}}"
        "{%- endif -%}"
    ),
    "chatml": (
        "{%- for m in messages -%}"
        "{{- '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "exaone": (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{- '[|system|][|endofturn|]\\n' -}}"
        "{%- endif -%}"
        "{%- for m in messages -%}"
        "{{- '[|' ~ m['role'] ~ '|]' ~ m['content'] -}}"
        "{{- '\\n' if m['role'] == 'user' else '[|endofturn|]\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- set head = '<|start_header_id|>%s<|end_header_id|>\\n\\n' -%}"
        "{%- for m in messages -%}"
        "{{- head % m['role'] ~ m['content'] | trim ~ '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- head % 'assistant' -}}{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}"
        "{%- set ns = namespace(system='') -%}"
        "{%- for m in messages -%}"
        "{%- if m['role'] == 'system' -%}"
        "{%- set ns.system = m['content'] ~ '\\n\\n' -%}"
        "{%- elif m['role'] == 'user' -%}"
        "{{- ' [INST] ' ~ ns.system ~ m['content'] ~ ' [/INST]' -}}"
        "{%- set ns.system = '' -%}"
        "{%- elif m['role'] == 'assistant' -%}"
        "{{- ' ' ~ m['content'] ~ eos_token -}}"
        "{%- else -%}"
        "{{- raise_exception('roles are system, user and assistant') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    ),
}
"""Name -> Jinja of well-known formats of chats."""


def chat_template(choice: str, folders: Mapping[str, Path]) -> str | None:
    """Return the text of a chat template; None if no model has one to choose.

    Args:
        choice: "auto" for the one that most of the models have, a name in `CHAT_TEMPLATES`, or
            the text.
        folders: ref -> the folder of each model.

    Raises:
        RecipeError: if the choice is no name and isn't Jinja.
    """
    if choice == "auto":
        found = Counter(
            text.strip() for folder in folders.values() if (text := template_of(folder))
        )
        return found.most_common(1)[0][0] if found else None
    if choice in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[choice]
    check_chat_template(choice)
    return choice


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model's folder, or None."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    for name in ("chat_template.json", SETTINGS):
        if (folder / name).is_file():
            template: Any = read_json(folder / name).get("chat_template")
            if isinstance(template, list):  # several templates, each with a name
                template = {entry["name"]: entry["template"] for entry in template}
            if isinstance(template, dict):
                template = template.get("default")
            if isinstance(template, str):
                return template
    return None


def check_chat_template(text: Any) -> None:
    """Check that a chat template is "auto", a name in `CHAT_TEMPLATES` or Jinja.

    Raises:
        RecipeError: saying what isn't Jinja.
    """
    if text == "auto" or text in CHAT_TEMPLATES:
        return
    if not isinstance(text, str) or "{" not in text:
        raise RecipeError(
            f"{text!r} is no chat template",
            hint=f"known: auto, {', '.join(CHAT_TEMPLATES)}; or a text in Jinja",
        )
    from jinja2 import Environment, TemplateSyntaxError

    # transformers' own tag marks what an assistant has said; it encloses any other text.
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"the chat template is not Jinja: {error.message}, in its line {error.lineno}"
        ) from error
