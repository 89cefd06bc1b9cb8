"""Environments as a user writes them; imports nothing: each worker process imports this anew."""

from __future__ import annotations


def echo(messages, answer):
    """A tool at first, then the reward; what the answer says goes wrong at the second turn."""
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(turns) == 1:
        return {"messages": [{"role": "tool", "content": "3 4"}], "reward": 0.25}
    if answer in RETURNED:
        return RETURNED[answer]
    calls = {"hang": hang, "crash": crash, "exit": leave, "raise": fail, "read": read}
    return {**calls, "flood": flood}.get(answer, good)(turns)


def tool(content, **more):
    return {"messages": [{"role": "tool", "content": content, **more}]}


RETURNED = {
    "text": "done",
    "object": {"reward": object()},
    "nan": {"reward": float("nan")},
    "typo": {"rewards": 1.0},
    "chat": {"messages": [{"role": "assistant", "content": "1"}]},
    "ids": tool("3", token_ids=[1]),
    "half": tool("\ud800"),
    "special": tool("3 ; 4"),
}


def dialogue(messages, answer):
    """A tool and a user in turn, four times; then the number of turns as the reward."""
    turns = sum(message["role"] == "assistant" for message in messages)
    if turns == 5:
        return {"reward": float(turns)}
    role = "tool" if turns % 2 else "user"
    return {"messages": [{"role": role, "content": f"five, says the {role}"}]}


def calculator(messages, answer):
    """Runs the calls of the last turn; without any, the turn is the result."""
    calls = messages[-1].get("tool_calls", [])
    if not calls:
        return {"reward": float(messages[-1]["content"] == answer)}
    results = []
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        content = f"{name} {sum(arguments.values())}"
        results.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return {"messages": results}


def good(turns):
    return {"reward": float(turns[-1]["content"] == "1 3")}


def endless(messages, answer):
    return {"messages": [{"role": "tool", "content": "5"}]}


def hang(turns):
    while True:
        pass


def crash(turns):
    import os

    os.abort()


def leave(turns):
    import os

    os._exit(3)


def fail(turns):
    raise KeyError("no such tool")


def read(turns):
    return {"reward": float(input())}


def flood(turns):
    """As a child process writes it, past Python's own standard output."""
    import os

    for _ in range(10_000):
        os.write(1, b'{"value": 7}\n')
    return good(turns)
