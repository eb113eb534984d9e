"""The other end of `Child.ask` in router_processes.py: a process that answers a line with a line.

Called by bench/router_load.py and chaos/load.py, whose commands are the methods of one object.
"""

import asyncio
import json
import sys
from collections.abc import Callable


async def answer_lines(make: Callable[[], object], failures: tuple[type[Exception], ...]) -> None:
    """Makes the object, says that it is ready, and does what each line of stdin says, to its end.

    A line is a JSON object: the method's name as "do", and its arguments. The answer is what the
    coroutine returns, or the error where that is one of `failures`.
    """
    commands = make()
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        try:
            result = await getattr(commands, command.pop("do"))(**command)
        except failures as error:
            result = {"error": str(error)}
        print(json.dumps(result), flush=True)
