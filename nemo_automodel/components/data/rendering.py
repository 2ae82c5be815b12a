"""A row of data as text, and which characters of it are supervised."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_automodel.components.data.config import DataConfig
from nemo_automodel.components.data.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

ACCEPTED = (
    "messages: [{role, content}, ...]; conversations: [{from, value}, ...]; prompt and completion: two strings or two "
    "lists of messages; text: a string"
)
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
}
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode keeps these two for internal use: no text has them
_GENERATION_TAG = re.compile(r"(?:^[ \t]*)?\{%(-?)\s*(end)?generation\s*(-?)%\}\n?", re.MULTILINE)


@dataclass(frozen=True)
class Rendered:
    """The text of a row.

    Attributes:
        kind: where the text is from; only a chat has its special tokens (BOS, end of turn) written out.
        text: all of it.
        spans: the `[start, end)` characters to supervise, in order.
    """

    kind: Literal["chat", "completion", "text"]
    text: str
    spans: list[Span]


class Renderer:
    """Turns rows into text, by the columns they have.

    - `messages` (or `conversations`, with from/value and ShareGPT's roles too), and `tools` if given: the chat
      template writes the text; the assistant's turns are supervised, each with its end-of-turn token.
    - `prompt` and `completion`, strings: taken literally, without any template; the completion is supervised. As lists
      of messages they are one conversation in which the assistant turns of the completion are supervised.
    - `text`: all of it is supervised.

    Args:
        tokenizer: a tokenizer of transformers; its chat template is used unless `config` names another.
        config: `chat_template` and `assistant_turns` are read.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: DataConfig):
        self._tokenizer, self._config = tokenizer, config

    def __call__(self, row: Row) -> Rendered:
        """Render one row.

        Raises:
            ValueError: the columns or messages are not as expected, or the chat template does not allow to tell what
                the assistant wrote.
        """
        columns = {name: value for name, value in row.items() if value is not None}
        for name in ("messages", "conversations"):
            if name in columns:
                return self._chat([], columns[name], columns.get("tools"))
        if {"prompt", "completion"} <= columns.keys():
            prompt, completion = columns["prompt"], columns["completion"]
            if isinstance(prompt, list) and isinstance(completion, list):
                return self._chat(prompt, completion, columns.get("tools"))
            if isinstance(prompt, str) and isinstance(completion, str):
                text = prompt + completion
                return Rendered("completion", text, [(len(prompt), len(text))])
            raise ValueError("prompt and completion must be two strings or two lists of messages")
        if "text" in columns:
            if not isinstance(columns["text"], str):
                raise ValueError(f"text must be a string, not {type(columns['text']).__name__}")
            return Rendered("text", columns["text"], [(0, len(columns["text"]))])
        raise ValueError(f"found the columns {', '.join(columns) or '(none)'}; accepted are {ACCEPTED}")

    @cached_property
    def template(self) -> str:
        """The chat template.

        Raises:
            ValueError: there is none, or its file cannot be read.
        """
        path = self._config.chat_template
        if path is None:
            return str(self._tokenizer.get_chat_template())
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read chat_template: {error}") from error

    @cached_property
    def template_hash(self) -> str:
        """The first 12 hex digits of the SHA-256 of the chat template."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:12]

    def _chat(self, prompt: Any, completion: Any, tools: Any) -> Rendered:
        """A conversation of which the assistant turns in `completion` are supervised."""
        before = _read_messages(prompt)
        messages = before + _read_messages(completion)
        if not messages:
            raise ValueError("there are no messages")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        # to answer nothing is not a lesson: an empty turn would teach its end alone
        filled = [
            i for i in assistant if messages[i].get("tool_calls") or str(messages[i].get("content") or "").strip()
        ]
        turns = [index for index in filled if index >= len(before)]
        turns = turns[-1:] if self._config.assistant_turns == "last" else turns
        text = self._render(messages, tools)
        if self._marked_template == self.template:
            spans = self._spans_by_prefix(messages, tools, text, turns)
        else:
            spans = self._spans_by_marks(messages, tools, text)
            if turns != assistant:
                if len(spans) != len(assistant):
                    raise ValueError(
                        f"the chat template has {len(spans)} generation blocks for {len(assistant)} assistant turns: "
                        "it cannot be told which of them belong to the turns to supervise"
                    )
                spans = [span for index, span in zip(assistant, spans, strict=True) if index in turns]
        # White space after the end of a turn belongs to the template, not to the answer.
        return Rendered("chat", text, [(start, start + len(text[start:end].rstrip())) for start, end in spans])

    def _render(self, messages: list[Message], tools: Any, template: str | None = None, answer: bool = False) -> str:
        """The text of some messages; with `answer`, up to where the assistant's answer would begin."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template or self.template,
                add_generation_prompt=answer,
                tokenize=False,
            )
        except Exception as error:  # a template is a program: whatever it raises, the row has to be named
            raise ValueError(f"the chat template fails: {error}") from error
        return str(text)

    def _spans_by_prefix(self, messages: list[Message], tools: Any, text: str, turns: list[int]) -> list[Span]:
        """Find turns by what the text gains with each, which needs a template that only ever appends."""
        spans = []
        for turn in turns:
            before = self._render(messages[:turn], tools, answer=True) if turn else ""
            last = turn + 1 == len(messages)
            after = text if last else self._render(messages[: turn + 1], tools)
            if not (turn and after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"where the assistant turn in message {turn} begins or ends cannot be told: the chat template does "
                    "not append it to the messages before it, or changes it when others follow (as templates do that "
                    "remove earlier thinking). Set assistant_turns to last to supervise only the last turn, "
                    "or chat_template to a template that appends or that has {% generation %} blocks"
                )
            spans.append((len(before), len(after)))
        return spans

    @cached_property
    def _marked_template(self) -> str:
        """The template with the borders of its generation blocks printed; without blocks, the template itself.

        This leaves the text between the marks as the template's author wrote it: a block tag takes along the blanks
        before it on its line and the line break behind it, as jinja does under `lstrip_blocks` and `trim_blocks`.
        """
        return _GENERATION_TAG.sub(
            lambda tag: f'{{{{{tag[1]} "{_CLOSE if tag[2] else _OPEN}" {tag[3]}}}}}',
            self.template,
        )

    def _spans_by_marks(self, messages: list[Message], tools: Any, text: str) -> list[Span]:
        """Find what the template's generation blocks wrote.

        `apply_chat_template(return_assistant_tokens_mask=True)` is for this, but it miscounts: blocks in a macro or in
        `{% set %}` are shifted, and where offsets leave out spaces, a block that begins with one clears all masks and
        one that ends with one takes in the user's next turns.
        """
        marked = self._render(messages, tools, self._marked_template)
        marked = marked.replace(_CLOSE + _OPEN, "").replace(_OPEN + _CLOSE, "")  # join neighbours, drop empty blocks
        if re.sub(f"[{_OPEN}{_CLOSE}]", "", marked) != text:
            raise ValueError("the chat template changes the output of its {% generation %} blocks")
        spans: list[Span] = []
        for block in re.finditer(f"{_OPEN}([^{_OPEN}{_CLOSE}]+){_CLOSE}", marked):
            start = block.start() - 2 * len(spans)
            spans.append((start, start + len(block[1])))
        return spans


def _read_messages(value: Any) -> list[Message]:
    """Check messages and name their parts as templates do; parts that are None are left out.

    Raises:
        ValueError: a message is not a dict, has no content or a role that is not known.
    """
    if not isinstance(value, list):
        raise ValueError(f"expected a list of messages, got {type(value).__name__}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} must have role and content, got {message!r}")
        parts = {name: part for name, part in message.items() if part is not None}
        role = parts.pop("role", None) or parts.pop("from", None)
        if str(role) not in ROLES:
            raise ValueError(f"message {index} has the role {role!r}; known are {', '.join(ROLES)}")
        if "value" in parts:
            parts["content"] = parts.pop("value")
        if "content" not in parts and "tool_calls" not in parts:
            raise ValueError(f"message {index} has no content")
        messages.append({"role": ROLES[role], **parts})
    return messages
