"Tables, pages of them, and pictures with masks"
import re

import matplotlib.pyplot as plt, numpy as np, pytest

from semisup_seg.core import IGNORE
from semisup_seg.data.images import Codes
from semisup_seg.display import PALETTE, Displayable, Table, img_tag, overlay, show_rows

GREY = np.uint8(np.random.default_rng(0).integers(0, 256, (12, 17)))

def sides(table):
    "Where each column of `table` stands, by its first line of values"
    return re.findall('<td style="text-align:(left|right)', table._repr_html_().split('<tr>')[2])

@pytest.mark.parametrize('values,side', [
    ((1, 20), 'right'), ((0.5, '–'), 'right'), (('', '+0.020 [-0.010, +0.050]'), 'right'), (('9.4%', '12 %'), 'right'), (('1.31 G', '491,954'), 'right'),
    (('a', 1), 'left'), (('64×96', '9'), 'left'), (('better', 'worse'), 'left'), (('1.png', '2.png'), 'left'), (('1–3', '4'), 'left')])
def test_numbers_stand_right(values, side): assert sides(Table([['x'], *([v] for v in values)]))==[side]

def test_table_escapes_all_but_links():
    text = Table([['<b>', 'a|b'], ['<img src=x onerror=alert(1)>', '[paper](https://doi.org/10.1) & [x](javascript:alert)']])._repr_html_()
    assert not re.search('<(b|img|script)', text) and '&lt;img' in text and '<a href="https://doi.org/10.1">paper</a> &amp; [x](javascript:alert)' in text
    assert '"x' not in Table([['u'], ['[a](https://b"x)']])._repr_html_()

def test_table_without_rows():
    t = Table([['name', 'value']])
    assert t._repr_html_().count('<th')==2 and '<td' not in t._repr_html_() and str(t)=='name  value'

def test_vertical_bars_do_not_break_a_markdown_table(): assert Table([['a|b'], ['c']])._repr_markdown_()=='| a\\|b |\n| --- |\n| c |'

def test_displayable_is_its_parts_in_all_three_ways():
    class Two(Displayable):
        def parts(self): return [Table([['a'], [1]]), '1 < 2']
    assert repr(Two())=='a\n1\n\n1 < 2' and Two()._repr_markdown_()=='| a |\n| --- |\n| 1 |\n\n1 < 2'
    assert '>1</td>' in Two()._repr_html_() and '1 &lt; 2' in Two()._repr_html_()

def test_codes_show_each_class_in_its_colour():
    many = Codes(tuple(f'c<{i}' for i in range(12)), tuple((i, i+100) for i in range(12)))._repr_html_()
    for i in range(12): assert f'c&lt;{i}</td>' in many and f'>{i}, {i+100}</td>' in many
    for i,c in enumerate(PALETTE[1:]): assert many.count('#%02x%02x%02x' % tuple(c))==1 + (i+8<12)

def test_overlay_leaves_ignored_pixels_clear():
    im = np.stack([GREY]*3, -1)
    m = np.where(GREY>128, IGNORE, 0).astype(np.uint8)
    assert (overlay(im, m)==im).all()
    assert (overlay(im, np.ones_like(GREY))!=im).any(-1).mean()>0.9

def test_overlay_blends_each_class_with_its_colour():
    mask = np.uint8([[0, 1, 7, 8]])
    got = overlay(np.full((1, 4, 3), 100, np.uint8), mask, alpha=0.5)[0]
    assert (got==np.uint8([[100]*3, *(50+PALETTE[[1, 7, 1]]/2)])).all()

def test_show_rows_titles_the_columns_and_labels_the_rows():
    show_rows([[GREY]*3, [GREY]*3], ['a', 'b', 'c'], ['first', 'second'])
    axs = plt.gcf().axes
    plt.close()
    assert [a.get_title() for a in axs]==['a', 'b', 'c', '', '', ''] and [a.get_ylabel() for a in axs]==['first', '', '', 'second', '', '']

def test_img_tag_holds_the_picture_and_its_description():
    assert re.fullmatch('<img alt="&lt;b&gt;" src="data:image/jpeg;base64,[^"]+">', img_tag(GREY, '<b>'))
    fig = plt.figure(figsize=(1, 1))
    plt.close()
    assert 'data:image/png;base64,' in img_tag(fig)
    assert len(img_tag(np.zeros((999, 999, 3), np.uint8)))<4000
