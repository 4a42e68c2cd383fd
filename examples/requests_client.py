"""No SDK: JSON over HTTP, the picture in base64, in one piece and as a stream.

pip install requests
python examples/requests_client.py [URL]
"""

import base64
import json
import sys
from pathlib import Path

import requests

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:9997"
PICTURES = Path(__file__).parent.parent / "foveate" / "demo" / "pictures"

data = base64.b64encode((PICTURES / "receipt.png").read_bytes()).decode()
body = {
    "model": requests.get(f"{URL}/v1/models", timeout=10).json()["data"][0]["id"],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                {"type": "text", "text": "How much is the total?"},
            ],
        }
    ],
}
# With a key: headers={"Authorization": f"Bearer {key}"}

response = requests.post(f"{URL}/v1/chat/completions", json=body, timeout=600)
answer = response.json()
if not response.ok:
    sys.exit(answer["error"]["message"])
print(answer["choices"][0]["message"]["content"])
print(answer["usage"])

# As a stream: lines of "data: {...}", and "data: [DONE]" last. To close the connection is to stop the answer.
with requests.post(f"{URL}/v1/chat/completions", json={**body, "stream": True}, stream=True, timeout=600) as response:
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                sys.exit(event["error"]["message"])
            for choice in event["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
print()
