"""What the command line shows: one sink for people (tables, a progress bar), programs (`--json`) and `--quiet`."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from regsurgery.cli.console import console
from regsurgery.progress import Progress
from regsurgery.verification.verdict_text import parity_row, remarks, rows, sentence, title

if TYPE_CHECKING:
    from regsurgery.commands.diff import Difference
    from regsurgery.commands.patch import PatchResult
    from regsurgery.commands.reproduce import Reproduction
    from regsurgery.commands.unpatch import Restored
    from regsurgery.evaluation.result import Evaluation
    from regsurgery.hub.push import Pushed
    from regsurgery.recipe import Recipe
    from regsurgery.reporting.report import Report
    from regsurgery.search.decide import Found
    from regsurgery.search.diagnosis import Diagnosis
    from regsurgery.search.faithful import SettingRow
    from regsurgery.search.shares import FoundPart
    from regsurgery.surveying.survey import Survey
    from regsurgery.verification.live import StillPatched
    from regsurgery.verification.size_drift import SizeDrifts
    from regsurgery.verification.verdict import Verdict

BAR_WIDTH = 16
UNLIMITED = 10_000  # columns, to ask how wide a table would be
PLAIN_EVERY = 10.0  # seconds between two lines about the same stage, if no bar can be drawn


class _DoneColumn(ProgressColumn):
    """How much of a stage is done, in images or in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.bytes = MofNCompleteColumn(), DownloadColumn()

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        return (self.bytes if task.fields["in_bytes"] else self.images).render(task)


class _LeftColumn(ProgressColumn):
    """The remaining time of a stage, if its end is known."""

    def __init__(self) -> None:
        super().__init__()
        self.left = TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        if task.total is None or task.time_remaining is None:
            return Text()
        return Text.assemble(self.left.render(task), " left")


class _PlainLines:
    """Progress for logs, where no bar can be drawn: a line when a stage begins, and one now and then while it runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.name, self.total, self.done, self.in_bytes = "", None, 0, False
        self.began = self.said = time.monotonic()

    def stage(self, name: str, total: int | None, in_bytes: bool) -> None:
        self.name, self.total, self.done, self.in_bytes = name, total, 0, in_bytes
        self.began = self.said = time.monotonic()
        self._print(name if total is None else f"{name}: 0 of {self._amount(total)}")

    def advance(self, number: int) -> None:
        self.done += number
        now = time.monotonic()
        if now - self.said >= PLAIN_EVERY:
            self.said = now
            took = now - self.began
            of, left = "", ""
            if self.total is not None:
                of = f" of {self._amount(self.total)}"
                if 0 < self.done < self.total:
                    left = f", about {took / self.done * (self.total - self.done):.0f} s left"
            self._print(f"{self.name}: {self._amount(self.done)}{of} after {took:.0f} s{left}")

    def _amount(self, number: int) -> str:
        return decimal(number) if self.in_bytes else str(number)

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


class Screen(Progress):
    """Draws progress on stderr while in the `with` block, results on stdout after it."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.errors = console(stderr=True, quiet=quiet or as_json)
        self.out = console(quiet=quiet or as_json)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            _DoneColumn(),
            TimeElapsedColumn(),
            _LeftColumn(),
            console=self.errors,
            transient=True,
            disable=not self.errors.is_terminal,
        )
        self.task = self.bar.add_task("", visible=False, total=None, in_bytes=False)
        self.lines = None if self.errors.is_terminal else _PlainLines(self.errors)

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        self.bar.reset(self.task, description=name, total=total, visible=True, in_bytes=in_bytes)
        if self.lines is not None:
            self.lines.stage(name, total, in_bytes)

    def advance(self, number: int) -> None:
        self.bar.advance(self.task, number)
        if self.lines is not None:
            self.lines.advance(number)

    def say(self, line: str) -> None:
        self.errors.print(line, soft_wrap=True)

    def patched(self, result: PatchResult, pushed: Pushed | None = None) -> None:
        if self.as_json:
            more = {} if pushed is None else {"pushed": pushed.as_dict()}
            print(json.dumps({**result.as_dict(), **more}, indent=2))
        if result.verdict is not None:
            self._figures(result.verdict)
        if result.sizes is not None:
            self._sizes(result.sizes)
        where = f"wrote {result.output}" if result.output else "dry run: nothing written"
        self._neurons(result.recipe)
        self.out.print(
            f"{where} ({result.format}, mode {result.mode}) in {result.seconds:.1f} s, "
            f"peak memory {result.peak_rss_mb:.0f} MB",
            soft_wrap=True,
        )
        if result.call:
            self.out.print(f"load it with {result.call}", soft_wrap=True, markup=False)
        if pushed is not None:
            self._pushed(pushed)
        if result.verdict is None:
            self.out.print(
                "not verified: the output was loaded, run on one generated picture and compared with the patched graph"
            )
        else:
            self._outcome(result.verdict)

    def verified(self, verdict: Verdict) -> None:
        if self.as_json:
            print(json.dumps(verdict.as_dict(), indent=2))
        self._figures(verdict)
        self._outcome(verdict)

    def checked(self, seen: StillPatched) -> None:
        if self.as_json:
            print(json.dumps(seen.as_dict(), indent=2))
        images = f"{seen.num_images} images"
        norms = f"{seen.outliers_per_image:.2f} outlier tokens per image after block {seen.block}, over {images}"
        self.out.print(f"mode {seen.mode}: {norms}; largest patch norm {seen.max_patch_norm:.4g}", soft_wrap=True)
        if seen.silent:
            blocks = ", ".join(map(str, seen.silent))
            self.out.print(f"note: no register neuron of block {blocks} fired on these images", soft_wrap=True)
        for problem in seen.problems:
            self.out.print(problem, soft_wrap=True)
        self.out.print("the surgery is in effect" if seen else "the surgery is not in effect")

    def evaluated(self, evaluation: Evaluation) -> None:
        from regsurgery.cli.tables import evaluation_table, with_places_below
        from regsurgery.evaluation.result import caption, cells

        if self.as_json:
            print(json.dumps(evaluation.as_dict(), indent=2))
        self.out.print(caption(evaluation), soft_wrap=True)
        head, body = cells(evaluation)
        table = evaluation_table(head, body)
        if self.out.measure(table, options=self.out.options.update(max_width=UNLIMITED)).maximum > self.out.width:
            table = evaluation_table(*with_places_below(head, body))
        self.out.print(table)
        for line in (evaluation.expectation, *evaluation.notes):
            if line:
                self.out.print(line, soft_wrap=True)

    def reported(self, report: Report) -> None:
        if self.as_json:
            print(json.dumps(report.as_dict(), indent=2))
        size = f"{report.size / 1e6:.1f} MB"
        self.out.print(f"wrote {report.path}: {report.num_images} images, {size}", soft_wrap=True)
        if report.live is not None:
            site, name = shlex.quote(str(report.live.parent)), quote(report.live.name)
            self.out.print(
                f"wrote {report.live}: {report.live_size / 1e6:.1f} MB; browsers load it from a server alone: "
                f"`python -m http.server -b 127.0.0.1 -d {site}`, then open http://127.0.0.1:8000/{name}/",
                soft_wrap=True,
                markup=False,
            )

    def surveyed(self, survey: Survey) -> None:
        if self.as_json:
            print(json.dumps(survey.as_dict(), indent=2))
        for model in survey.models:
            self.out.print(f"{model.name}: {model.summary}", soft_wrap=True)
            for record in model.records:
                if record.error is not None:
                    self.out.print(f"  {record.stage}: {record.outcome}: {record.error}", soft_wrap=True)
        self.out.print(f"wrote survey.md, survey.html and survey.json in {survey.output}", soft_wrap=True)
        if survey.failed:
            self.out.print(f"failed: {', '.join(survey.failed)}", soft_wrap=True)

    def found(self, found: Found, output: Path) -> None:
        if self.as_json:
            print(json.dumps(found.as_dict(), indent=2))
        self.out.print(f"{found.num_images} images searched; settings compared on {found.judged_on}", soft_wrap=True)
        logits = any(row.tried.kl is not None for row in found.choice.rows)
        drift = ("KL", "same class") if logits else ("drift",)
        columns = ("neurons", "R", "outliers", "norm", *drift, "cost, %")
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:  # if it is too wide, the names are what wraps
            column.justify, column.no_wrap = "right", True
        for row in found.choice.rows:
            table.add_row(*_setting_cells(row))
        self.out.print(table)
        self.out.print(
            "R: register tokens; norm: of a register; cost: tokens added\n* chosen; (p) the paper's setting",
        )
        first, second = (*found.candidates, None, None)[:2]
        if first is not None and second is not None:
            self.out.print(
                f"best candidate {first.block}:{first.neuron}, contribution {first.contribution:.3g}; "
                f"next {second.block}:{second.neuron}, {second.contribution:.3g}",
            )
        self._neurons(found.recipe)
        self.out.print(found.second_resolution.note, soft_wrap=True)
        if not found.suppressed:
            self.out.print("NOT suppressed: outlier tokens remain, or the register is starved")
        self.out.print(f"wrote {output}", soft_wrap=True)

    def found_part(self, found: FoundPart) -> None:
        if self.as_json:
            print(json.dumps(found.as_dict(), indent=2))
        part, broken = found.part, f", {found.num_broken} could not be read" if found.num_broken else ""
        self.out.print(f"part {part.number} of {part.total}: {found.num_images} images{broken}")
        self.out.print(f"wrote {found.stats}", soft_wrap=True)

    def _neurons(self, recipe: Recipe) -> None:
        neurons = ", ".join(f"{b}:{n}" for b, listed in recipe.register_neurons.items() for n in listed)
        self.out.print(f"register neurons (block:neuron): {neurons or 'none'}", soft_wrap=True)

    def diagnosed(self, diagnosis: Diagnosis) -> None:
        if self.as_json:
            print(json.dumps(diagnosis.as_dict(), indent=2))
        if diagnosis.blocks and diagnosis.tokens is not None:
            rows = [("tokens", diagnosis.tokens), *((str(i), block) for i, block in enumerate(diagnosis.blocks))]
            table = Table("block", "median", "p99", "max", "max/median", "outliers", "", box=box.SIMPLE_HEAD)
            for column in table.columns[1:6]:
                column.justify = "right"
            highest = max(norms.max_over_median for _, norms in rows)
            for name, norms in rows:
                bar = "█" * max(1, round(BAR_WIDTH * norms.max_over_median / highest))
                table.add_row(
                    name,
                    f"{norms.median:.1f}",
                    f"{norms.p99:.1f}",
                    f"{norms.max:.1f}",
                    f"{norms.max_over_median:.1f}",
                    f"{norms.outliers:.2f}",
                    bar,
                )
            self.out.print(f"patch norms after each block, {diagnosis.images}", soft_wrap=True)
            self.out.print(table)
        if diagnosis.verdict == "none":
            line = f"Healthy: no outlier tokens, nothing to patch ({diagnosis.reason})"
        else:
            fix = {"register_neurons": "", "unsupported": "cannot be patched: "}.get(
                diagnosis.verdict, "nothing to fix: "
            )
            line = f"{diagnosis.verdict}: {fix}{diagnosis.reason}"
        self.out.print(line, soft_wrap=True)

    def unpatched(self, restored: Restored) -> None:
        if self.as_json:
            print(json.dumps(restored.as_dict(), indent=2))
        for name, digest in restored.files.items():
            self.out.print(f"{digest}  {name}", soft_wrap=True)
        for names, what in (
            (
                restored.changed,
                "changed after patching (by training, for example); the restored files do not include it",
            ),
            (restored.not_copied, "weight files of the source that patching did not copy; they are not restored"),
        ):
            if names:
                self.out.print(f"{', '.join(names)}: {what}", soft_wrap=True)
        self.out.print(
            f"wrote {restored.output}: {restored.source['id']} restored, sha256 of {len(restored.files)} files equal",
            soft_wrap=True,
        )

    def pushed(self, pushed: Pushed) -> None:
        if self.as_json:
            print(json.dumps(pushed.as_dict(), indent=2))
        for one in (pushed, *([] if pushed.space is None else [pushed.space])):
            self._pushed_files(one)

    def _pushed_files(self, pushed: Pushed) -> None:
        table = Table("file", "bytes", box=box.SIMPLE_HEAD)
        table.columns[1].justify = "right"
        for name, size in pushed.files.items():
            table.add_row(Text(name), f"{size:,}")
        self.out.print(table)
        for name in pushed.removed:
            self.out.print(f"removed {name}", soft_wrap=True)
        total = sum(pushed.files.values()) / 1e6
        what = f"{len(pushed.files)} files, {total:.1f} MB"
        if pushed.url is None:
            self.out.print(f"dry run: {what} would go to {pushed.repo}", soft_wrap=True)
        else:
            self._pushed(pushed)

    def _pushed(self, pushed: Pushed) -> None:
        where = pushed.pull_request or pushed.url
        self.out.print(
            f"pushed {len(pushed.files)} files to {where} (commit {(pushed.commit or '')[:12]})",
            soft_wrap=True,
        )

    def reproduced(self, reproduction: Reproduction) -> None:
        if self.as_json:
            print(json.dumps(reproduction.as_dict(), indent=2))
        for name, difference in reproduction.differences.items():
            self.out.print(f"{name}  {difference}", soft_wrap=True)
        for name, (then, now) in reproduction.figures.items():
            self.out.print(f"figure {name} was {then}, now {now}", soft_wrap=True)
        if reproduction.note:
            self.out.print(reproduction.note, soft_wrap=True)
        number, files = len(reproduction.differences), reproduction.num_files
        outcome = f"DIFFERENT in {number} of {files} files" if number else f"all {files} files identical"
        where = f"; wrote {reproduction.output}" if reproduction.output else ""
        self.out.print(f"{reproduction.source} patched again: {outcome}{where}", soft_wrap=True)

    def compared(self, difference: Difference) -> None:
        if self.as_json:
            print(json.dumps(difference.as_dict(), indent=2))
        for line in difference_lines(difference):
            self.out.print(line, soft_wrap=True)

    def _figures(self, verdict: Verdict) -> None:
        table = Table(
            "",
            "original",
            "patched, 95 %",
            "images",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title=title(verdict),
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for row in (*rows(verdict), parity_row(verdict)):
            table.add_row(row.name, row.original, f"{row.patched}\n{row.interval}".rstrip(), row.images)
        self.out.print(table)

    def _outcome(self, verdict: Verdict) -> None:
        for line in (*remarks(verdict), sentence(verdict)):
            self.out.print(line, soft_wrap=True)

    def _sizes(self, sizes: SizeDrifts) -> None:
        for row in sizes.rows if len(sizes.rows) > 1 else ():
            error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
            registers = "1 register" if row.num_registers == 1 else f"{row.num_registers} registers"
            self.out.print(
                f"at {row.image_size[0]}x{row.image_size[1]} pixels, {registers}: {row.measure} {row.drift:.4f}{error} "
                f"({row.num_images} images)",
                soft_wrap=True,
            )
        for note in sizes.notes:
            self.out.print(f"note: {note}", soft_wrap=True)


def _setting_cells(row: SettingRow) -> list[str]:
    """A row of the table of settings, as text."""
    figures, tried = row.tried.means(), row.tried
    fill = "" if row.setting.fill == "zero" else f", fill {row.setting.fill}"
    cells = [f"{'*' if row.chosen else ' '} {row.name}{fill}{' (p)' if row.paper else ''}",
             str(row.setting.num_registers), f"{figures['outliers']:.2f}", f"{figures['register_norm']:.0f}",
             f"{figures['drift']:.4f}"]  # fmt: skip
    if tried.same_argmax is not None:
        cells.append(f"{int(tried.same_argmax.sum())} of {len(tried.same_argmax)}")
    return [*cells, f"{row.cost:.2f}"]


def difference_lines(difference: Difference) -> list[str]:
    """A line for every tensor that is not identical, and the summary."""
    rows = [
        *(("only in A", tensor.name, f"{tensor.dtype} {list(tensor.shape)}") for tensor in difference.only_a),
        *(("only in B", tensor.name, f"{tensor.dtype} {list(tensor.shape)}") for tensor in difference.only_b),
    ]
    for tensor in difference.retyped:
        is_, was = f"{tensor.dtype_b} {list(tensor.shape_b)}", f"{tensor.dtype_a} {list(tensor.shape_a)}"
        rows.append(("type", tensor.name, f"{was} -> {is_}"))
    for tensor in difference.changed:
        largest = "no numbers to compare" if tensor.max_abs is None else f"max abs {tensor.max_abs:.4g}"
        nan = f", {tensor.num_nan} NaN" if tensor.num_nan else ""
        count = f"{tensor.num_different} of {tensor.num_elements} elements"
        rows.append(("values", tensor.name, f"{tensor.dtype} {list(tensor.shape)}  {largest}, {count}{nan}"))
    width = max((len(name) for _, name, _ in rows), default=0)
    return [*(f"{kind:9}  {name:{width}}  {what}" for kind, name, what in rows), difference.summary]
