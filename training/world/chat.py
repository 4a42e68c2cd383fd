"""Small talk, what the model is, and what it says to questions outside its world."""

from __future__ import annotations

import random

from training.world.phrases import question
from training.world.records import Turn
from training.world.scene_phrases import Phrases
from training.world.vocabulary import COLOURS, KINDS, plural, shape_name, with_article

ANSWERS = {
    "who": {
        "en": (
            "I am the Foveate demo model, a small model that looks at pictures of shapes, printed text, "
            "charts and receipts."
        ),
        "zh": "我是 Foveate 演示模型，一个能看图形、文字、图表和小票图片的小模型。",
    },
    "able": {
        "en": (
            "I can describe, count and compare shapes, read printed text, charts and receipts, and find "
            "differences between two pictures."
        ),
        "zh": "我能描述、数和比较图形，读出文字、图表和小票，还能找出两张图的不同。",
    },
    "hello": {"en": "Hello! Send me a picture and ask me about it.", "zh": "你好！发给我一张图片，问我吧。"},
    "thanks": {"en": "You are welcome!", "zh": "不客气！"},
    "bye": {"en": "Goodbye!", "zh": "再见！"},
    "outside": {
        "en": "I only know about pictures of shapes, text, charts and receipts.",
        "zh": "我只了解图形、文字、图表和小票的图片。",
    },
    "no_picture": {"en": "I see no picture. Please send one.", "zh": "我没有看到图片，请发一张给我。"},
}

_TALK: Phrases = {
    "who": {
        "en": (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Which model are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Are you ChatGPT?",
            "Who made you?",
        ),
        "zh": (
            "你是谁？",
            "你叫什么名字？",
            "你是什么模型？",
            "介绍一下你自己。",
            "请自我介绍一下。",
            "你是什么？",
            "你是ChatGPT吗？",
        ),
    },
    "able": {
        "en": (
            "What can you do?",
            "What are you able to do?",
            "How can you help me?",
            "What can I ask you?",
            "What are your abilities?",
            "Help",
        ),
        "zh": (
            "你能做什么？",
            "你会什么？",
            "你有什么功能？",
            "我可以问你什么？",
            "你能帮我做什么？",
            "帮助",
        ),
    },
    "hello": {
        "en": (
            "Hello!",
            "Hi!",
            "Hi",
            "Hello",
            "Good morning!",
            "Hey there!",
            "Hello there.",
            "Good evening.",
        ),
        "zh": ("你好！", "你好", "您好！", "嗨！", "早上好！", "晚上好！", "你好啊。"),
    },
    "thanks": {
        "en": ("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much!", "Great, thanks.", "Thx"),
        "zh": ("谢谢！", "谢谢你。", "多谢！", "非常感谢！", "好的，谢谢。", "谢谢"),
    },
    "bye": {
        "en": ("Bye!", "Goodbye!", "See you later.", "Goodbye.", "See you!", "Bye bye"),
        "zh": ("再见！", "再见。", "拜拜！", "下次见。", "回头见！"),
    },
}

_OUTSIDE: dict[str, tuple[str, ...]] = {
    "en": (
        "What is the capital of {place}?",
        "Who is the president of {place}?",
        "How many people live in {place}?",
        "What is the weather like in {place}?",
        "Which language do they speak in {place}?",
        "What is {a} plus {b}?",
        "What is {a} times {b}?",
        "Calculate {a} - {b}.",
        "Write a poem about {thing}.",
        "Tell me a story about {thing}.",
        "Explain {topic}.",
        "What is {topic}?",
        "Tell me a joke.",
        "What time is it?",
        "What day is it today?",
        "Who won the game yesterday?",
        "How do I cook {thing}?",
        "Write a Python function that sorts a list.",
        "Translate this sentence into French.",
        "Who wrote Hamlet?",
        "What is the meaning of life?",
        "How old are you?",
        "Recommend me a book about {topic}.",
        "How do I learn {topic}?",
        "When did the war end?",
        "What should I eat today?",
        "Do you like {thing}?",
        "Where can I buy {thing}?",
    ),
    "zh": (
        "{place}的首都是哪里？",
        "{place}的总统是谁？",
        "{place}有多少人口？",
        "{place}今天天气怎么样？",
        "{place}说什么语言？",
        "{a}加{b}等于多少？",
        "{a}乘以{b}是多少？",
        "计算{a}减{b}。",
        "写一首关于{thing}的诗。",
        "给我讲一个关于{thing}的故事。",
        "解释一下{topic}。",
        "什么是{topic}？",
        "讲个笑话。",
        "现在几点了？",
        "今天星期几？",
        "昨天谁赢了比赛？",
        "{thing}怎么做？",
        "写一个排序的Python函数。",
        "把这句话翻译成法语。",
        "《红楼梦》是谁写的？",
        "人生的意义是什么？",
        "你几岁了？",
        "推荐一本关于{topic}的书。",
        "怎么学习{topic}？",
        "我今天吃什么好？",
        "你喜欢{thing}吗？",
        "在哪里可以买到{thing}？",
    ),
}
_SLOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "place": (
            "France",
            "China",
            "Japan",
            "Brazil",
            "Germany",
            "India",
            "Paris",
            "London",
            "Canada",
            "Egypt",
        ),
        "thing": (
            "rice",
            "a cat",
            "the sea",
            "soup",
            "flowers",
            "a dog",
            "the moon",
            "noodles",
            "autumn",
            "coffee",
        ),
        "topic": (
            "gravity",
            "history",
            "machine learning",
            "English",
            "physics",
            "music",
            "the stock market",
            "love",
        ),
    },
    "zh": {
        "place": ("法国", "中国", "日本", "巴西", "德国", "印度", "巴黎", "北京", "加拿大", "上海"),
        "thing": ("米饭", "猫", "大海", "汤", "鲜花", "小狗", "月亮", "面条", "秋天", "咖啡"),
        "topic": ("重力", "历史", "机器学习", "英语", "物理", "音乐", "股票", "爱情"),
    },
}
_SCENE_KEYS = (
    ("describe", 3),
    ("count_all", 1),
    ("count_some", 1),
    ("colour_of", 1),
    ("place_of", 1),
    ("size_of", 1),
    ("exists", 1),
    ("ground", 1),
    ("read", 2),
    ("any_text", 1),
    ("total", 1),
    ("bar_highest", 1),
    ("title", 0.5),
    ("difference", 1),
)


def talk(rng: random.Random, language: str, kind: str) -> Turn:
    """One turn of small talk."""
    return Turn(rng.choice(_TALK[kind][language]), ANSWERS[kind][language], "chat", language)


def outside(rng: random.Random, language: str) -> Turn:
    """A question about the rest of the world."""
    slots = {name: rng.choice(values) for name, values in _SLOTS[language].items()}
    text = rng.choice(_OUTSIDE[language]).format(a=rng.randint(1, 99), b=rng.randint(1, 99), **slots)
    return Turn(text, ANSWERS["outside"][language], "chat", language)


def without_picture(rng: random.Random, language: str) -> Turn:
    """A question about a picture that nobody has sent."""
    key = rng.choices([key for key, _ in _SCENE_KEYS], [weight for _, weight in _SCENE_KEYS])[0]
    colour, kind = rng.choice((None, rng.choice(COLOURS))), rng.choice(KINDS)
    one = shape_name(colour, kind, language)
    many = f"{colour} {plural(kind)}" if colour else plural(kind)
    text = question(rng, key, language, one=one, many=many, a_one=with_article(one))
    return Turn(text, ANSWERS["no_picture"][language], "chat", language)


def small_talk(rng: random.Random, language: str, *, picture: bool) -> list[Turn]:
    """One turn that needs no picture, and that fits whether there is one or not."""
    kinds = ("who", "able", "thanks", "bye", "outside") if picture else ("who", "able", "hello", "thanks", "bye")
    if not picture:
        draw = rng.random()
        if draw < 0.3:
            return [outside(rng, language)]
        if draw < 0.6:
            return [without_picture(rng, language)]
    kind = rng.choice(kinds)
    return [outside(rng, language) if kind == "outside" else talk(rng, language, kind)]
