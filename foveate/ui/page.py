"""The page: a chat, and beside it what can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from foveate.ui.handlers import Handlers, Options, Turns
from foveate.ui.samples import SAMPLES
from foveate.ui.view import shown
from foveate.ui.words import LANGUAGES, language_of, words

Words = Mapping[str, str]

# Fonts of the visitor's own machine: none is fetched.
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
_SWITCH_THEME = "() => { document.body.classList.toggle('dark'); }"
_ATTACHED = "(message) => [((message && message.files) || []).map(file => [file.path, file.orig_name || ''])]"
_SHOW = "(on) => ({__type__: 'update', visible: on})"
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def theme() -> gr.themes.Base:
    """Return colours, sizes and fonts."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="md",
        text_size="md",
        font=_FONT,
        font_mono=_MONO,
    )


def style() -> str:
    """Return the style sheet."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


class Page:
    """Lays the page out and connects it. All of it is made inside of ``blocks``.

    Args:
        handlers: what happens.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._labels: list[tuple[Any, Callable[[Words], dict[str, Any]]]] = []
        self.blocks = gr.Blocks(
            title="Foveate", fill_height=True, fill_width=True, analytics_enabled=False, delete_cache=(3600, 6 * 3600)
        )
        with self.blocks:
            self.turns = gr.State([])
            self.options = gr.State({})
            self.attached = gr.JSON([], visible="hidden")
            self.stored_language = gr.BrowserState("", storage_key="foveate-language", secret="not secret")  # noqa: S106
            self._head()
            self._chat()
            self._settings()
            self._connect()

    def _labelled(self, component: Any, of: Callable[[Words], dict[str, Any]]) -> Any:
        """Note how a component's words depend on the language."""
        self._labels.append((component, of))
        return component

    def _head(self) -> None:
        text = words("en")
        with gr.Row(elem_id="fv-head"):
            gr.HTML("<h1>Foveate</h1>", elem_id="fv-name", padding=False)
            self.new = gr.Button(text["new"], size="sm", scale=0, min_width=60, elem_id="fv-new")
            self.language = gr.Radio(
                LANGUAGES, value="en", container=False, show_label=False, scale=0, min_width=60, elem_id="fv-language"
            )
            self.switch_theme = gr.Button("◐", size="sm", scale=0, min_width=36, elem_id="fv-theme")
        self._labelled(self.new, lambda text: {"value": text["new"]})

    def _chat(self) -> None:
        text = words("en")
        self.chat = gr.Chatbot(
            show_label=False,
            container=False,
            scale=1,
            min_height=200,
            height="100%",
            placeholder=_welcome(text),
            examples=_examples("en"),
            editable="user",
            buttons=["copy"],
            allow_tags=False,
            feedback_options=None,
            group_consecutive_messages=False,
            elem_id="fv-chat",
        )
        render = gr.render([self.attached, self.language, self.options], triggers=[self.attached.change])
        with gr.Column(elem_id="fv-options"):
            render(self._picture_options)
        self.camera = gr.Image(
            sources=["webcam"],
            type="filepath",
            format="jpeg",
            visible=False,
            height=320,
            show_label=False,
            buttons=[],
            elem_id="fv-webcam",
        )
        with gr.Row(elem_id="fv-ask"):
            self.box = gr.MultimodalTextbox(
                placeholder=text["placeholder"],
                show_label=False,
                container=False,
                sources=["upload"],
                file_types=["image"],
                file_count="multiple",
                lines=1,
                max_lines=8,
                max_plain_text_length=100_000,
                autofocus=True,
                elem_id="fv-box",
            )
            self.use_camera = gr.Button(text["camera"], size="sm", scale=0, min_width=60, elem_id="fv-camera")
        self._labelled(self.box, lambda text: {"placeholder": text["placeholder"]})
        self._labelled(self.use_camera, lambda text: {"value": text["camera"]})

    def _settings(self) -> None:
        def label(component: Any, name: str) -> Any:
            return self._labelled(component, lambda text: {"label": text[name]})

        text = words("en")
        with gr.Sidebar(position="right", open=False, width=300, elem_id="fv-settings") as self.sidebar:
            self.model = label(gr.Dropdown([], label=text["model"], elem_id="fv-model"), "model")
            self.key = gr.Textbox(
                label=text["key"],
                info=text["key_info"],
                type="password",
                max_lines=1,
                html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
                elem_id="fv-key",
            )
            self._labelled(self.key, lambda text: {"label": text["key"], "info": text["key_info"]})
            self.system = label(gr.Textbox(label=text["system"], lines=2, max_lines=6, elem_id="fv-system"), "system")
            self.own_sampling = label(
                gr.Checkbox(label=text["own_sampling"], container=False, elem_id="fv-own-sampling"), "own_sampling"
            )
            with gr.Group(visible=False) as self.numbers:
                self.sampling = [
                    label(gr.Slider(0, 2, 0.7, step=0.05, label=text["temperature"]), "temperature"),
                    label(gr.Slider(0, 1, 0.8, step=0.01, label=text["top_p"]), "top_p"),
                    label(gr.Slider(-2, 2, 0, step=0.05, label=text["frequency_penalty"]), "frequency_penalty"),
                    label(
                        gr.Number(0, minimum=0, precision=0, label=text["max_tokens"], elem_id="fv-max-tokens"),
                        "max_tokens",
                    ),
                    label(gr.Number(None, precision=0, label=text["seed"], elem_id="fv-seed"), "seed"),
                ]

    def _picture_options(self, attached: list[list[str]], language: str, options: Options) -> None:
        """Offer, for each picture in the box, how closely to look at it."""
        text = words(language)
        is_foveate = self._handlers.server.known_as_foveate
        details = [(f"{text['detail']}: {name}", name) for name in ("auto", "low", "high")]
        most = [(f"{text['slices']}: {number or text['slices_auto']}", number) for number in range(10)]
        for number, (path, name) in enumerate(attached or [], 1):
            detail, slices = options.get(path, ("auto", 0))
            with gr.Row(elem_classes="fv-option"):
                gr.HTML(f'<div class="fv-name">{number} · {escape(name)}</div>', padding=False)
                chosen: dict[str, Any] = {"container": False, "scale": 0, "filterable": False, "interactive": True}
                look = gr.Dropdown(details, value=detail, elem_classes=["fv-choice", "fv-detail"], **chosen)
                cut = gr.Dropdown(
                    most, value=slices, visible=is_foveate, elem_classes=["fv-choice", "fv-most-slices"], **chosen
                )

            def choose(detail: str, slices: int, options: Options, path: str = path) -> Options:
                return {**options, path: (detail, slices)}

            for one in (look, cut):
                one.input(choose, [look, cut, self.options], self.options, queue=False, **_QUIET)

    def _connect(self) -> None:
        handlers = self._handlers
        choices = [self.language, self.key, self.model, self.system, self.own_sampling, *self.sampling]
        update = [self.chat, self.box, self.turns]
        # Answers wait for the server, which bounds them, and not for each other.
        ask: dict[str, Any] = {"concurrency_limit": None, **_QUIET}
        self.box.submit(handlers.ask, [self.box, self.options, self.turns, *choices], update, **ask)
        self.chat.example_select(handlers.ask_sample, [self.turns, *choices], update, **ask)
        self.chat.retry(handlers.ask_again, [self.turns, *choices], update, **ask)
        self.chat.edit(handlers.ask_edited, [self.turns, *choices], update, **ask)
        self.box.stop(handlers.stop, queue=False, **_QUIET)
        for clear in (self.chat.clear, self.new.click):
            clear(handlers.clear, None, update, queue=False, **_QUIET)
        self.blocks.unload(handlers.leave)
        self.box.change(None, self.box, self.attached, js=_ATTACHED, **_QUIET)
        self.own_sampling.change(None, self.own_sampling, self.numbers, js=_SHOW, **_QUIET)
        self.switch_theme.click(None, js=_SWITCH_THEME, **_QUIET)
        self._connect_camera()
        models = {"fn": handlers.models, "inputs": [self.key, self.model], "outputs": [self.model, self.sidebar]}
        gr.on([self.blocks.load, self.key.submit, self.key.blur], **models, **_QUIET)
        self.blocks.load(_first_language, self.stored_language, self.language, **_QUIET)
        self.language.input(lambda chosen: chosen, self.language, self.stored_language, **_QUIET)
        relabelled = [component for component, _ in self._labels]
        self.language.change(self._relabel, [self.language, self.turns], [*relabelled, self.chat], **_QUIET)

    def _connect_camera(self) -> None:
        is_on = gr.State(False)
        self.use_camera.click(
            lambda on: (not on, gr.update(visible=not on)), is_on, [is_on, self.camera], queue=False, **_QUIET
        )

        def keep(taken: str | None, message: dict[str, Any]) -> tuple[Any, ...]:
            if taken is None:
                return (gr.skip(),) * 4
            files = [*(message.get("files") or ()), taken]
            box = {"text": message.get("text") or "", "files": files}
            attached = [[file, Path(file).name] for file in files]
            return box, attached, gr.update(value=None, visible=False), False

        outputs = [self.box, self.attached, self.camera, is_on]
        self.camera.input(keep, [self.camera, self.box], outputs, **_QUIET)

    def _relabel(self, language: str, turns: Turns) -> list[Any]:
        text = words(language)
        updates: list[Any] = [gr.update(**of(text)) for _, of in self._labels]
        chat = gr.update(value=shown(turns, text), placeholder=_welcome(text), examples=_examples(language))
        return [*updates, chat]


def _first_language(request: gr.Request, stored: str) -> Any:
    """Choose what was chosen before, or the browser's. The page is in English already, or was switched meanwhile."""
    language = stored or language_of(request.headers.get("accept-language", ""))
    return gr.skip() if language == "en" else language


def _welcome(text: Words) -> str:
    return f"## {text['welcome']}\n{text['hint']}"


def _examples(language: str) -> list[gr.components.chatbot.ExampleMessage]:
    return [
        {"text": one.question(language), "display_text": one.question(language), "icon": str(one.pictures[0])}
        for one in SAMPLES
    ]
