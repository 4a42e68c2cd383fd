"""The names of things, in both languages, and how they are put together."""

from __future__ import annotations

from collections.abc import Sequence

LANGUAGES = ("en", "zh")
KINDS = ("circle", "square", "triangle", "star", "diamond", "hexagon", "heart", "cross", "ring", "rectangle")
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "gray",
)
SIZES = ("small", "medium", "large")

KINDS_ZH = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "diamond": "菱形",
    "hexagon": "六边形",
    "heart": "心形",
    "cross": "十字形",
    "ring": "圆环",
    "rectangle": "长方形",
}
COLOURS_ZH = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "black": "黑色",
    "white": "白色",
    "gray": "灰色",
}
SIZES_ZH = {"small": "小的", "medium": "中等大小的", "large": "大的"}
SIZE_ANSWERS_ZH = {"small": "它很小。", "medium": "它大小中等。", "large": "它很大。"}

# Thirds in reading order: place // 3 is the row, place % 3 the column.
PLACES_EN = (
    "at the top left",
    "at the top center",
    "at the top right",
    "at the center left",
    "in the center",
    "at the center right",
    "at the bottom left",
    "at the bottom center",
    "at the bottom right",
)
PLACES_ZH = (
    "左上角",
    "上方中间",
    "右上角",
    "左侧中间",
    "正中间",
    "右侧中间",
    "左下角",
    "下方中间",
    "右下角",
)
# Other wordings that questions may use; answers never do.
PLACE_SYNONYMS_EN = (
    ("in the top left corner", "in the upper left"),
    ("at the top middle", "in the top middle"),
    ("in the top right corner", "in the upper right"),
    ("at the middle left", "in the middle left"),
    ("in the middle", "in the centre"),
    ("at the middle right", "in the middle right"),
    ("in the bottom left corner", "in the lower left"),
    ("at the bottom middle", "in the bottom middle"),
    ("in the bottom right corner", "in the lower right"),
)
PLACE_SYNONYMS_ZH = (
    ("左上方", "左上"),
    ("上面中间", "顶部中间"),
    ("右上方", "右上"),
    ("左边中间", "中间靠左"),
    ("中间", "中央"),
    ("右边中间", "中间靠右"),
    ("左下方", "左下"),
    ("下面中间", "底部中间"),
    ("右下方", "右下"),
)
KIND_SYNONYMS_ZH = {
    "circle": ("圆", "圆圈"),
    "square": ("方形",),
    "star": ("五角星", "星星"),
    "heart": ("爱心",),
    "cross": ("十字",),
    "ring": ("环形",),
    "rectangle": ("矩形",),
}


def plural(kind: str) -> str:
    """English plural of a kind of shape."""
    return kind + ("es" if kind == "cross" else "s")


def with_article(phrase: str) -> str:
    """An English phrase after "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def joined(parts: Sequence[str], language: str) -> str:
    """A list as it is said: "a, b and c"; "a、b和c"."""
    if len(parts) == 1:
        return parts[0]
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return comma.join(parts[:-1]) + last + parts[-1]


def quoted(text: str, language: str) -> str:
    """A printed string in the quotation marks of the language."""
    return f'"{text}"' if language == "en" else f"“{text}”"


def shape_name(colour: str | None, kind: str | None, language: str) -> str:
    """ "red circle", "circle" or "red shape"; 红色的圆形, 圆形 or 红色的图形."""
    if language == "en":
        noun = kind or "shape"
        return f"{colour} {noun}" if colour else noun
    noun = KINDS_ZH[kind] if kind else "图形"
    return f"{COLOURS_ZH[colour]}的{noun}" if colour else noun


def counted(count: int, colour: str | None, kind: str | None, language: str) -> str:
    """ "3 red circles"; 3个红色的圆形."""
    if language == "zh":
        return f"{count}个{shape_name(colour, kind, 'zh')}"
    noun = kind or "shape"
    name = noun if count == 1 else plural(noun)
    return f"{count} {colour} {name}" if colour else f"{count} {name}"


def place_name(place: int, language: str) -> str:
    """A third of the picture as answers say it."""
    return PLACES_EN[place] if language == "en" else PLACES_ZH[place]
