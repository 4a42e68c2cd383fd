"""OpenAI's own package: a picture streamed, two pictures, and several turns.

pip install openai
python examples/openai_client.py [URL]
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:9997"
PICTURES = Path(__file__).parent.parent / "foveate" / "demo" / "pictures"


def picture(name: str, detail: str = "auto") -> dict:
    """A part of a message that shows a picture. Its file travels in the request; an https: URL would do as well."""
    data = base64.b64encode((PICTURES / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", "detail": detail}}


def text(words: str) -> dict:
    """A part of a message that says something."""
    return {"type": "text", "text": words}


# Without --api-key the server wants no key, but this package does not start without one.
client = OpenAI(base_url=f"{URL}/v1", api_key="none")
model = client.models.list().data[0].id

# One picture, streamed.
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": [picture("shapes.png"), text("How many shapes are there?")]}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# Two pictures. What only this server understands goes into extra_body: here, the seconds of each stage.
answer = client.chat.completions.create(
    model=model,
    messages=[
        {
            "role": "user",
            "content": [picture("before.png"), picture("after.png"), text("Which picture shows a circle?")],
        }
    ],
    extra_body={"timings": True},
)
print(answer.choices[0].message.content)
print(f"{answer.usage.prompt_tokens} tokens were read, {answer.model_extra['timings']['total']:.3f} s in all")

# Several turns: the server remembers nothing, so everything said before is sent again.
messages = []
for question in ("What is at the top right?", "And what colour is it?"):
    shown = [] if messages else [picture("shapes.png", detail="low")]
    messages.append({"role": "user", "content": [*shown, text(question)]})
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    print(f"{question} {answer.choices[0].message.content}")
