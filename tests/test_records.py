"Records of annotations: tables that come back as they were, a Dice score to expect, records of several workers"
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest
from conftest import disc, photo, save

import semisup_seg.annotation.records as R
from semisup_seg.annotation.records import CHECKED, COLUMNS, AnnotationRecord, Annotations, merge_annotations, predict_dice, read_annotations
from semisup_seg.annotation.records import read_or_reason, reliability, show_annotations, show_calibration, spearman
from semisup_seg.data.images import load_image, parse_codes

HEAD = ','.join(COLUMNS)

def annotated(i=0, agreement=0.7, **kw):
    "The record of a mask"
    values = dict(confidence=0.9, entropy=0.1, used=True) | kw
    return AnnotationRecord(f'{i}.png', f'annotations/{i}.png', agreement=agreement, **values)

def checked(i=0, agreement=0.7, dice=None, confidence=0.8):
    "The record of a validation image"
    return AnnotationRecord(f'v{i}.png', label=f'v{i}_label.png', agreement=agreement, confidence=confidence, entropy=0.2, dice=dice)

def unread(i): return AnnotationRecord(f'{i}.png', error=f'{i}.png: cannot be read')

def lines(file):
    with open(file, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))

# --- tables

def test_tables_hold_every_column_and_come_back(tmp_path):
    rows = [annotated(0, 1/3, predicted_dice=0.25), annotated(1, used=False, judgement='rejected'), unread(2)]
    ann = Annotations(tmp_path, rows, [checked(0, dice=0.5), checked(1)]).save()
    table,calibration = lines(tmp_path/'annotations.csv'), lines(tmp_path/'calibration.csv')
    assert tuple(table[0])==COLUMNS and tuple(calibration[0])==CHECKED
    assert list(table[0].values())==['0.png', 'annotations/0.png', '0.9', '0.1', repr(1/3), '0.25', 'True', '', '']
    assert list(table[2].values())==['2.png', '', '', '', '', '', 'False', '', '2.png: cannot be read']
    assert [r['dice'] for r in calibration]==['0.5', '']
    assert read_annotations(tmp_path)==ann

def test_only_used_masks_are_pairs(tmp_path):
    ann = Annotations(tmp_path, [annotated(0, used=False), annotated(1), unread(2), annotated(3)], [])
    assert ann.pairs=={Path('1.png'): tmp_path/'annotations/1.png', Path('3.png'): tmp_path/'annotations/3.png'}
    assert [r.image for r in ann.unread]==['2.png'] and len(ann)==4

def test_masks_are_ranked_by_agreement_and_those_of_one_voter_by_confidence():
    rows = [annotated(0, 0.9, confidence=0.5), unread(1), annotated(2, 0.2, confidence=0.8)]
    alone = [replace(r, agreement=r.agreement and 1) for r in rows]
    assert [r.image for r in Annotations(Path('x'), rows, []).ranked()]==['2.png', '0.png']
    assert [r.image for r in Annotations(Path('x'), alone, []).ranked()]==['0.png', '2.png']
    assert (reliability(rows), reliability(alone))==('agreement', 'confidence')

def test_awkward_file_names_survive(tmp_path):
    rows = [replace(annotated(), image=n) for n in ('a, b.png', 'quote".png', 'ä ö.png', 'x.y.png', 'two\nlines.png')]
    Annotations(tmp_path, rows, []).save()
    assert read_annotations(tmp_path).rows==rows

def test_columns_added_by_hand_stay_in_their_place(tmp_path):
    table = tmp_path/'annotations.csv'
    table.write_text('note,' + HEAD.replace(',judgement', '') + '\nmine,0.png,0.png,0.9,0.1,0.8,,True,\n')
    ann = read_annotations(tmp_path)
    ann.rows[0].used = False
    ann.rows.append(annotated(1))
    ann.save()
    first,second = lines(table)
    assert list(first)==['note', *(c for c in COLUMNS if c!='judgement'), 'judgement']
    assert (first['note'], first['used'], second['note'], second['used'])==('mine', 'False', '', 'True')
    Annotations(tmp_path, ann.rows, []).save()
    assert lines(table)[0]['note']=='mine'

def test_used_as_a_spreadsheet_writes_it(tmp_path):
    for word,used in dict(True_=1, False_=0, TRUE_=1, FALSE_=0, true_=1).items():
        (tmp_path/'annotations.csv').write_text(f'{HEAD}\na.png,annotations/a.png,0.9,0.1,0.8,,{word[:-1]},\n')
        assert len(read_annotations(tmp_path).pairs)==used, word

@pytest.mark.parametrize('text,message', [
    ('', 'it needs the columns image, mask'), ('x', 'it needs the columns'), ('image,mask\na,b\n', 'it needs the columns'),
    (f'{HEAD}\na,b,much,0.5,0.5,,True,\n', "could not convert string to float: 'much'"), (f'{HEAD}\na,b,,,,,True,\n', 'a has a mask and no numbers'),
    (f'{HEAD}\na,b\n', "used is ''; expected True or False"), (f'{HEAD}\na,b,0.5,0.5,0.5,,perhaps,,\n', "used is 'perhaps'"),
    (f'{HEAD}\na,b,0.5,0.5,0.5,,True,good,\n', "the judgement 'good'; known are accepted, rejected, in training"),
    (f'{HEAD}\na,b,0.5,0.5,0.5,,True,,,more\n', 'a: more cells than names of columns')])
def test_a_table_that_was_spoilt_is_named_with_what_is_wrong(tmp_path, text, message):
    (tmp_path/'annotations.csv').write_text(text)
    with pytest.raises(ValueError, match='annotations.csv: is not a table of annotations') as e: read_annotations(tmp_path)
    assert message in str(e.value)

def test_a_spoilt_calibration_is_named_too(tmp_path):
    Annotations(tmp_path, [annotated()], [checked(dice=0.5)]).save()
    (tmp_path/'calibration.csv').write_text('image,label\na,b\n')
    with pytest.raises(ValueError, match='calibration.csv: is not a table.*dice'): read_annotations(tmp_path)

def test_no_table(tmp_path):
    with pytest.raises(ValueError, match='annotations.csv: no such file'): read_annotations(tmp_path)

# --- what to expect of a mask

CASES = [([], [None, None]), ([(0.5, None)], [None, None]), ([(0.5, 0.6)], [0.6, 0.6]), ([(0.5, 0.6), (0.9, 0.8)], [0.7, 0.7]),
    ([(0.5, 0.6)]*3, [0.6, 0.6]), ([(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)], [0.6, 1.0]), ([(0.5, 0.9), (0.9, 0.9), (0.7, None), (0.6, 0.9)], [0.9, 0.9])]

def test_predicted_dice_is_a_line_and_with_few_images_their_mean():
    for known,want in CASES:
        got = predict_dice([annotated(0, 0.6), annotated(1, 1.2)], [checked(i, *o) for i,o in enumerate(known)])
        assert got==pytest.approx(want), known
    assert predict_dice([unread(0)], [checked(dice=0.5)])==[None]

def test_a_single_voter_is_judged_by_its_confidence():
    known = [checked(0, 1, d, c) for d,c in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8))]
    assert predict_dice([annotated(0, 1, confidence=0.9)], known)==pytest.approx([0.8])

def test_correlation():
    assert spearman([1, 2, 3], [2, 4, 9])==pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1])==pytest.approx(-1)
    assert np.isnan(spearman([1, 1], [1, 2])) and np.isnan(spearman([1, 2], [1, 1]))

# --- records of several workers

def test_records_of_workers_become_one_table(tmp_path, capsys):
    labelled = replace(annotated(2, 0.7), label='2_label.png', dice=0.1)  # a mask to train with, and its truth
    known = [checked(i, a, a-0.1) for i,a in enumerate((0.6, 0.8, 0.9))]
    known = [replace(r, used=True) for r in known] + [replace(checked(7), error='v7.png: cannot be read')]
    ann = merge_annotations(tmp_path, [known[2], annotated(5, 0.5), unread(3), *known[:2], labelled, known[3], annotated(0, 0.8)])
    assert [(r.image, r.predicted_dice) for r in ann.rows]==[('5.png', 0.4), ('3.png', None), ('2.png', 0.6), ('0.png', 0.7)]
    assert [(r.image, r.used) for r in ann.checked]==[('v2.png', False), ('v0.png', False), ('v1.png', False)]
    assert capsys.readouterr().out=='1 of 4 images could not be read; annotations.csv says why\n'
    again = read_annotations(tmp_path)
    assert again.checked==ann.checked and again.rows[2]==replace(ann.rows[2], label=None, dice=None) and again.rows[3]==ann.rows[3]

def test_a_record_may_come_twice_but_not_two_of_one_image(tmp_path):
    twice = [annotated(0), checked(0), replace(annotated(0), stamp=[1, 2]), checked(0)]
    ann = merge_annotations(tmp_path, twice)
    assert (len(ann.rows), len(ann.checked))==(1, 1)
    for other in (replace(annotated(0), confidence=0.1), unread(0)):
        with pytest.raises(ValueError, match='records: 0.png is given twice'): merge_annotations(tmp_path/'other', [annotated(0), annotated(1), other])
    assert not (tmp_path/'other').exists()

def test_an_image_may_be_annotated_and_checked(tmp_path):
    ann = merge_annotations(tmp_path, [replace(checked(0, 0.5, 0.5), image='0.png'), annotated(0)])
    assert ann.rows[0].image==ann.checked[0].image=='0.png' and ann.rows[0].predicted_dice==0.5

def test_the_calibration_of_an_earlier_call_goes(tmp_path, capsys):
    merge_annotations(tmp_path, [annotated(), checked(dice=0.5)])
    assert merge_annotations(tmp_path, [annotated()]).rows[0].predicted_dice is None
    assert read_annotations(tmp_path).checked==[] and not capsys.readouterr().out

# --- pictures

@pytest.fixture
def drawn(tmp_path):
    "Annotations whose images and masks exist"
    rng = np.random.default_rng(0)
    ann = Annotations(tmp_path, [replace(annotated(i, 0.5+i/10), image=str(tmp_path/f'{i}.png')) for i in range(5)], [])
    for r in ann.rows:
        d = disc(20, 30, rng)
        save(Path(r.image), photo(d, rng))
        save(tmp_path/r.mask, np.uint8(d)*255)
    return ann

def test_the_least_and_the_most_trusted_are_shown(drawn, monkeypatch):
    seen = []
    monkeypatch.setattr(R, 'show_rows', lambda rows, **kw: seen.append([len(r) for r in rows]))
    for n in (2, 9): show_annotations(drawn, parse_codes('rest,0\ndisc,255'), n)
    assert seen==[[2, 2], [5, 5]]

def test_a_file_that_cannot_be_read_gives_the_reason(drawn, tmp_path):
    (tmp_path/'1.png').write_bytes(b'broken')
    assert read_or_reason(load_image, tmp_path/'0.png').shape==(20, 30, 3)
    assert read_or_reason(load_image, tmp_path/'1.png').startswith('1.png: cannot be read') and read_or_reason(load_image, tmp_path/'9.png')=='9.png: no such file'

def test_calibration_is_drawn_where_there_is_one(drawn):
    show_calibration(replace(drawn, checked=[checked(i, 0.5+i/10, 0.4+i/10) for i in range(4)]))
    with pytest.raises(ValueError, match='no validation image'): show_calibration(replace(drawn, checked=[checked(0)]))

def test_annotations_print_means_and_what_could_not_be_read():
    ann = Annotations(Path('out'), [annotated(0, 0.5), annotated(1, 0.7), *(unread(i) for i in range(2, 8))], [])
    assert repr(ann)=='8 annotations in out, mean confidence 0.900, agreement 0.600; 6 could not be read: 2.png, 3.png, 4.png, 5.png, 6.png…'
