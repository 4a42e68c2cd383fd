"""LangChain: a picture in a prompt of a chain, streamed.

pip install langchain-openai
python examples/langchain_client.py [URL]
"""

import base64
import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:9997"
PICTURES = Path(__file__).parent.parent / "foveate" / "demo" / "pictures"

# The name of another model than the demo goes here: GET /v1/models lists it.
model = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model="foveate-demo", temperature=0)
prompt = ChatPromptTemplate.from_messages(
    [
        (
            "human",
            [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,{picture}"}},
                {"type": "text", "text": "{question}"},
            ],
        )
    ]
)
chain = prompt | model | StrOutputParser()

picture = base64.b64encode((PICTURES / "chart.png").read_bytes()).decode()
for piece in chain.stream({"picture": picture, "question": "How much is MAR?"}):
    print(piece, end="", flush=True)
print()

# Many at once: the server computes them together.
questions = [{"picture": picture, "question": f"How much is {name}?"} for name in ("S7", "79D2")]
for answer in chain.batch(questions):
    print(answer)
