"""The process that renders chat templates: `python -m router.template_child`.

Started, fed and ended by router/template_process.py. A line of JSON in, a line of JSON out, in
order. The first line in is the template, with the limits under which the process is to live; its
answer says whether it is one. It ends with its standard input, and by itself when a line takes it
too long, so that none is left behind by a router that was killed.
"""

import json
import resource
import signal
import sys
from typing import Any

from router.chat import ChatTemplate, ChatTemplateError

# What rendering has no use for, whatever a template finds to do: a file, a process, a core dump.
_NONE_OF = (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for others
    first = _read()
    if first is None:
        return
    signal.setitimer(signal.ITIMER_REAL, first["line_ms"] / 1000)
    resource.setrlimit(resource.RLIMIT_AS, (first["memory_bytes"], first["memory_bytes"]))
    for limit in _NONE_OF:
        resource.setrlimit(limit, (0, 0))
    try:
        template = ChatTemplate(first["source"], first["special_tokens"])
    except ChatTemplateError as error:
        _write({"error": str(error)})
        return
    _write({})
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        messages = _read()
        if messages is None:
            return
        signal.setitimer(signal.ITIMER_REAL, first["line_ms"] / 1000)
        _write(_render(template, messages, first["text_bytes_max"]))


def _render(template: ChatTemplate, messages: Any, text_bytes_max: int) -> dict[str, str]:
    try:
        text = template.render(messages)
    except ChatTemplateError as error:
        return {"error": str(error)}
    size = len(text.encode(errors="replace"))
    if size > text_bytes_max:
        why = f"makes {size} bytes of these messages, at most {text_bytes_max} are allowed"
        return {"error": f"the model's chat template {why}"}
    return {"text": text}


def _read() -> Any:
    line = sys.stdin.buffer.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _write(answer: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
