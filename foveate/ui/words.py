"""Every word that the page shows, in its two languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[tuple[str, Language], ...] = (("English", "en"), ("中文", "zh"))

_TABLE: dict[str, tuple[str, str]] = {
    "placeholder": ("Ask about pictures: add, paste or drop them here", "就图片提问：在此添加、粘贴或拖入图片"),
    "welcome": ("Ask about a picture", "就图片提问"),
    "hint": ("Add your own below, or try one of these.", "在下方添加自己的图片，或点一个示例试试。"),
    "new": ("New chat", "新对话"),
    "camera": ("Camera", "拍照"),
    "language": ("Language", "语言"),
    "model": ("Model", "模型"),
    "key": ("API key", "API 密钥"),
    "key_info": ("Sent to the server with each request, and kept nowhere.", "随每次请求发给服务器，不会保存。"),
    "system": ("System prompt", "系统提示词"),
    "own_sampling": ("Own sampling settings", "自定采样设置"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top p", "Top p"),
    "frequency_penalty": ("Frequency penalty", "频率惩罚"),
    "max_tokens": ("Most tokens of an answer (0: all that fit)", "回答的最大词元数（0：不限）"),
    "seed": ("Seed (empty: another each time)", "随机种子（留空则每次不同）"),
    "detail": ("Detail", "细节"),
    "slices": ("Slices", "切片"),
    "slices_auto": ("auto", "自动"),
    "error": ("Error", "出错"),
    "stopped": ("stopped", "已停止"),
    "cut": ("cut off: it reached the most tokens", "已截断：达到最大词元数"),
    "busy": ("An answer is still being written; stop it first.", "回答还在生成，请先停止。"),
    "empty": ("Please ask something, or add a picture.", "请输入问题，或添加图片。"),
    "foreign": ("This file was not uploaded here.", "该文件不是在此上传的。"),
    "text_tokens": ("text", "文本"),
    "picture_tokens": ("picture", "图片"),
    "tokens": ("tokens", "词元"),
    "answer_tokens": ("answer", "回答"),
    "first_token": ("first token", "首个词元"),
    "per_second": ("tokens/s", "词元/秒"),
    "cached": ("cached", "命中缓存"),
    "from_cache": ("known from before", "来自缓存"),
    "overview": ("overview", "全图"),
    "no_slices": ("seen whole, no slices", "只看全图，无切片"),
    "stages": ("Time to first token", "首个词元的用时"),
    "fetch": ("fetch", "获取"),
    "picture_decode": ("decode", "解码"),
    "slice": ("slice", "切片"),
    "queue": ("queue", "排队"),
    "encode": ("encode", "编码"),
    "write": ("hand over", "移交"),
    "wait": ("wait", "等待"),
    "read": ("read", "读取"),
    "prefill": ("prefill", "预填充"),
    "other": ("the rest", "其余"),
}


def words(language: str) -> Mapping[str, str]:
    """Return the words of a language; of English, if it is none of ours."""
    column = 1 if language == "zh" else 0
    return {key: pair[column] for key, pair in _TABLE.items()}


def language_of(accept_language: str) -> Language:
    """Choose by a browser's ``Accept-Language``: its first one."""
    return "zh" if accept_language.strip().lower().startswith("zh") else "en"
