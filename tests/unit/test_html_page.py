"""Text on a page stays text: captions, names and paths are anybody's."""

from __future__ import annotations

from hive_ds.page import STYLE, document, picture, table

TEXT, ESCAPED = '<b> & "c"', "&lt;b&gt; &amp; &quot;c&quot;"


def test_cells_of_a_table_are_escaped_and_sums_stand_out() -> None:
    assert table([[TEXT, "of"], [TEXT, "1"], ["all", "2"], ["total", TEXT]]) == (
        '<div class="wide"><table>'
        f"<tr><th>{ESCAPED}</th><th>of</th></tr>"
        f"<tr><td>{ESCAPED}</td><td>1</td></tr>"
        '<tr class="last"><td>all</td><td>2</td></tr>'
        f'<tr class="last"><td>total</td><td>{ESCAPED}</td></tr>'
        "</table></div>"
    )


def test_a_picture_lies_in_the_page() -> None:
    assert picture(b"\x89", "png", TEXT) == f'<img alt="{ESCAPED}" src="data:image/png;base64,iQ==">'


def test_a_document_has_its_title_its_sections_in_order_and_its_own_style_last() -> None:
    page = document(TEXT, ["<p>one</p>", "<p>two</p>"], "p { color: red }")
    assert (
        f"<title>{ESCAPED}</title><style>{STYLE}p {{ color: red }}</style></head><body>\n<p>one</p>\n<p>two</p>" in page
    )
    assert page.startswith('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">')
