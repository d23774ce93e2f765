"The data sets: the clinical ones made small, in the layouts of their archives"
import gzip, io, json, re, zipfile

import nibabel as nib, numpy as np, pytest
from conftest import ROOT, disc, pack, photo, tree
from PIL import Image

import semisup_seg.data.sources as sources
from semisup_seg.core import DatasetError
from semisup_seg.data.folder import check_dataset, split_files, unlabeled_files
from semisup_seg.data.images import load_image, load_mask, read_codes
from semisup_seg.data.sources import SOURCES, brain_slices, busi, covid_ct, kvasir_seg

DATA = ROOT.parent/'shared/data'

def samples(
    name:str, # A folder of `DATA`
    n:int,    # How many
    classes=2,
):
    "`n` images and their masks (class indices): real ones where `DATA` is there, otherwise drawn ones"
    files = sorted((DATA/name/'images').iterdir())[:n*7:7] if (DATA/name).is_dir() else []
    masks = [np.array(Image.open((DATA/name/'masks'/f.name).with_suffix('.png'))) for f in files]
    if files: return [(load_image(f), np.minimum(m, classes-1)) for f,m in zip(files, masks)]
    rng = np.random.default_rng(0)
    discs = [disc(48+2*i, 64, rng) for i in range(n)]
    return [(np.stack([photo(d, rng)]*3, -1), np.uint8(d)*(classes-1)) for d in discs]

def picture(a, kind):
    b = io.BytesIO()
    Image.fromarray(a).save(b, kind, **(dict(quality=75) if kind=='jpeg' else {}))
    return b.getvalue()

@pytest.fixture(scope='session')
def shelf(tmp_path_factory):
    "The archives in small: 15 polyps, 6 benign, 4 malignant and 3 normal ultrasound images, 10 scans of 8 patients"
    root = tmp_path_factory.mktemp('shelf')
    polyps = {}
    for i,(im,m) in enumerate(samples('kvasir_seg_256', 15)):
        for d,a in dict(images=im, masks=m*255).items(): polyps[f'Kvasir-SEG/{d}/cju{i:02}.jpg'] = picture(a, 'jpeg')
    pack(root/'kvasir-seg.zip', {'Kvasir-SEG/kavsir_bboxes.json': b'{}', **polyps, '__MACOSX/Kvasir-SEG/images/._cju00.jpg': b'no picture'})
    breasts = {}
    for i,(im,m) in enumerate(samples('busi_320', 13)):
        kind,k = ('benign', i+1) if i<6 else ('malignant', i-5) if i<10 else ('normal', i-9)
        left = (np.arange(m.shape[1])<m.shape[1]//2)*m*255
        masks = dict(_mask=m*255*(kind!='normal')) if i else dict(_mask=left, _mask_1=m*255-left, _mask_2=left*0)
        for s,a in {'': im, **masks}.items(): breasts[f'Dataset_BUSI_with_GT/{kind}/{kind} ({k}){s}.png'] = picture(np.uint8(a)>127 if s and i==1 else np.uint8(a), 'png')
    pack(root/'Dataset_BUSI.zip', breasts)
    pack_covid(root)
    return root

PATIENTS = [f'coronacases_{i:03}' for i in range(1, 6)] + ['radiopaedia_10_85902_1', 'radiopaedia_10_85902_3', 'radiopaedia_29_86490_1', 'radiopaedia_29_86491_1', 'radiopaedia_4_85506_1']
FLIPPED = np.diag([-1., -1, 1, 1])  # as a DICOM converter leaves it: left and back first

def pack_covid(root):
    "Scans of 7 slices, the first and the last without lung; 3 is infection"
    cts,masks = {},{}
    pairs = [(im[:48, :64, 0], m[:48, :64]) for im,m in samples('covid_ct_256', 10, 3)]
    for k,(im,m) in zip(PATIENTS, pairs):
        m = m.copy()
        m[0, 0] = 1
        label = np.stack([m*0, *[np.uint8([0, 1, 3])[m]]*5, m*0], -1)
        label[:24][label[:24]==1] = 2
        grey = np.stack([np.minimum(im, 249)+i for i in range(7)], -1)
        ct = grey if k[0]=='r' else np.int16(grey)*6-1250
        for to,a in ((cts, ct), (masks, label)):
            volume = np.ascontiguousarray(np.rot90(a, -1)[::-1, ::-1])  # from rows and columns to x and y of `FLIPPED`
            to[f'{k}.nii.gz'] = gzip.compress(nib.Nifti1Image(volume, FLIPPED).to_bytes(), 1)
    pack(root/'COVID-19-CT-Seg_20cases.zip', cts)
    pack(root/'Lung_and_Infection_Mask.zip', masks)

@pytest.fixture
def official(server, shelf, monkeypatch):
    "The table of addresses, led to `server`, which holds the small archives"
    for f in shelf.iterdir(): (server.root/f.name).write_bytes(f.read_bytes())
    for name,o in SOURCES.items(): monkeypatch.setitem(SOURCES, name, dict(o, files={f: (f'{server.url}/{f}?download=1', None) for f in o['files']}))
    return server

SMALL = dict(n_labelled=3, n_valid=2)

def names(path, split): return {i.stem for i,_ in split_files(path, split)}

# --- downloads

def test_official_address(official, tmp_path, capsys):
    path = kvasir_seg(tmp_path/'d', **SMALL)
    assert check_dataset(path).counts==dict(train=3, valid=2, test=3, unlabeled=7)
    assert (tmp_path/'kvasir-seg.zip').read_bytes()==(official.root/'kvasir-seg.zip').read_bytes()
    out = capsys.readouterr().out
    assert out.count('research and education')==1 and out.count('Jha et al.')==1
    before = tree(tmp_path)
    assert kvasir_seg(path, **SMALL)==path and capsys.readouterr().out=='' and len(official.log)==1
    kvasir_seg(tmp_path/'e', n_labelled=4, n_valid=2)
    assert len(official.log)==1 and before.items()<=tree(tmp_path).items() and not list(tmp_path.glob('.*'))

def test_both_files_of_covid(official, tmp_path):
    check_dataset(covid_ct(tmp_path/'d', **SMALL))
    assert [n for n,_,_ in official.log]==['COVID-19-CT-Seg_20cases.zip', 'Lung_and_Infection_Mask.zip']

def test_mirror(official, tmp_path):
    (official.root/'other.zip').write_bytes((official.root/'Dataset_BUSI.zip').read_bytes())
    busi(tmp_path/'d', archive=f'{official.url}/other.zip', **SMALL)
    assert [n for n,_,_ in official.log]==['other.zip'] and (tmp_path/'Dataset_BUSI.zip').is_file()

# --- archives at hand

def test_own_archive_stays_as_it_is(shelf, tmp_path):
    mine = tmp_path/'my polyps.zip'
    mine.write_bytes((shelf/'kvasir-seg.zip').read_bytes())
    before = tree(tmp_path)
    kvasir_seg(tmp_path/'d', archive=str(mine), **SMALL)
    assert before.items()<=tree(tmp_path).items() and {p.name for p in tmp_path.iterdir()}=={'d', mine.name}

def test_wrong_archives(shelf, tmp_path):
    scans,masks = [shelf/f for f in SOURCES['covid_ct']['files']]
    (tmp_path/'page.zip').write_text('<html>Please log in</html>')
    damaged = bytearray((shelf/'kvasir-seg.zip').read_bytes())
    damaged[len(damaged)//2] ^= 255
    (tmp_path/'damaged.zip').write_bytes(damaged)
    (tmp_path/'empty').mkdir()
    def fails(f, archive, match):
        before = tree(tmp_path)
        with pytest.raises(ValueError, match=match): f(tmp_path/'d', archive=archive, **SMALL)
        assert tree(tmp_path)==before and not (tmp_path/'d').exists()
    fails(kvasir_seg, tmp_path/'none.zip', 'none.zip: no such file')
    fails(kvasir_seg, tmp_path/'empty', 'kvasir-seg.zip: no such file')
    fails(kvasir_seg, tmp_path/'page.zip', 'page.zip: cannot be read as a zip archive')
    fails(kvasir_seg, tmp_path/'damaged.zip', 'damaged.zip: the member .* is damaged')
    fails(kvasir_seg, shelf/'Dataset_BUSI.zip', 'Dataset_BUSI.zip: holds no images of this data set')
    fails(busi, shelf/'kvasir-seg.zip', 'kvasir-seg.zip: holds no images')
    fails(covid_ct, scans, 'archive: 1 given; covid_ct takes 2: COVID-19-CT-Seg_20cases.zip, Lung_and_Infection_Mask.zip')
    fails(covid_ct, [masks, scans], r'labels -?\d+ to -?\d+; expected 0 to 3')

def test_unmatched_and_unreadable_members(tmp_path):
    (im,m),(small,_) = samples('kvasir_seg_256', 2)
    jpg,mask,odd = picture(im, 'jpeg'),picture(m*255, 'jpeg'),picture(m[:-9]*255, 'jpeg')
    a = pack(tmp_path/'a.zip', {'K/images/a.jpg': jpg, 'K/images/b.jpg': jpg, 'K/masks/b.jpg': mask, 'K/masks/c.jpg': mask})
    with pytest.raises(DatasetError) as e: kvasir_seg(tmp_path/'d', archive=a)
    assert [f.split('a.zip: ')[1] for f in e.value.faults]==['K/images/a.jpg has no mask', "the mask of 'c' has no image"]
    b = pack(tmp_path/'b.zip', {'K/images/a.jpg': jpg, 'K/masks/a.jpg': odd})
    with pytest.raises(DatasetError, match=r'K/masks/a.jpg is \d+×\d+ pixels, its image \d+×\d+'): kvasir_seg(tmp_path/'d', archive=b)
    for name in ('images', 'masks'):
        c = pack(tmp_path/'c.zip', {'K/images/a.jpg': jpg, 'K/masks/a.jpg': mask, f'K/{name}/a.jpg': b'no picture'})
        with pytest.raises(DatasetError, match=f'c.zip: K/{name}/a.jpg cannot be read as an image'): kvasir_seg(tmp_path/'d', archive=c)
    d = [pack(tmp_path/f, {'a.nii.gz': b'no volume'}) for f in ('d.zip', 'e.zip')]
    with pytest.raises(DatasetError, match='d.zip: a.nii.gz cannot be read as a NIfTI volume'): covid_ct(tmp_path/'d', archive=d)
    flat = [pack(tmp_path/f, {'a.nii': nib.Nifti1Image(np.zeros((5, 5, n), np.uint8), np.eye(4)).to_bytes()}) for f,n in (('f.zip', 3), ('g.zip', 2))]
    with pytest.raises(DatasetError, match=r'g.zip: a.nii has shape \(5, 5, 2\), its scan \(5, 5, 3\)'): covid_ct(tmp_path/'d', archive=flat)

def test_refuses_what_is_there(shelf, tmp_path):
    path = busi(tmp_path/'d', archive=shelf, **SMALL)
    before = tree(path)
    for kw in (dict(n_labelled=2), dict(n_valid=1), dict(normal=True)):
        with pytest.raises(DatasetError, match='holds something else already'): busi(path, archive=shelf, **{**SMALL, **kw})
    with pytest.raises(DatasetError, match='holds something else already'): kvasir_seg(path, archive=shelf, **SMALL)
    with pytest.raises(DatasetError, match='is a file'): kvasir_seg(path/'codes.txt', archive=shelf, **SMALL)
    assert tree(path)==before

@pytest.mark.parametrize('kw,match', [
    (dict(n_labelled=0), 'n_labelled is 0'), (dict(n_labelled=2.5), 'n_labelled is 2.5'), (dict(n_valid=0), 'n_valid is 0'),
    (dict(n_labelled=11), 'n_valid is 2, n_labelled 11; of 15 images 3 are for testing, 2 left to validate, 10 to learn from'),
    (dict(n_valid=13), 'n_valid is 13, n_labelled 3; of 15 images 3 are for testing, 12 left to validate, 0 to learn from')])
def test_numbers_that_do_not_fit(shelf, tmp_path, kw, match):
    with pytest.raises(ValueError, match=match): kvasir_seg(tmp_path/'d', archive=shelf, **{**SMALL, **kw})
    assert not list(tmp_path.iterdir())

# --- what is written

def test_kvasir(shelf, tmp_path):
    path = kvasir_seg(tmp_path/'d', archive=shelf, **SMALL)
    with zipfile.ZipFile(shelf/'kvasir-seg.zip') as z:
        for s in ('train', 'valid', 'test'):
            for i,l in split_files(path, s):
                assert i.read_bytes()==z.read(f'Kvasir-SEG/images/{i.name}')
                grey = np.array(Image.open(io.BytesIO(z.read(f'Kvasir-SEG/masks/{i.name}'))).convert('L'))
                assert len(np.unique(grey))>2 and (load_mask(l)==np.where(grey>127, 255, 0)).all()
    about = json.loads((path/'about.json').read_text())
    assert about==dict(name='kvasir_seg', **{k: SOURCES['kvasir_seg'][k] for k in ('source', 'licence', 'citation')}, n_labelled=3, n_valid=2)
    assert read_codes(path).names==('rest', 'polyp')

def test_labels_of_the_unlabelled_stay_out(shelf, tmp_path):
    path = kvasir_seg(tmp_path/'d', archive=shelf, **SMALL)
    assert {p.name for p in path.iterdir()}=={'Images', 'Labels', 'unlabeled_images', 'codes.txt', 'about.json'}
    assert len([f for f in tree(path/'Labels')])==8 and len(unlabeled_files(path))==7

def test_all_labelled(shelf, tmp_path):
    path = kvasir_seg(tmp_path/'d', n_labelled=10, n_valid=2, archive=shelf)
    assert check_dataset(path).counts==dict(train=10, valid=2, test=3)

def test_split_is_fixed(shelf, tmp_path):
    a,b,c = [kvasir_seg(tmp_path/k, n_labelled=n, n_valid=2, archive=shelf) for k,n in dict(a=3, b=3, c=6).items()]
    assert tree(a)==tree(b)
    assert names(a, 'test')==names(c, 'test')=={'cju00', 'cju09', 'cju11'} and names(a, 'valid')==names(c, 'valid')
    assert names(a, 'train')!={'cju00', 'cju01', 'cju02'}

def test_busi_merges_masks(shelf, tmp_path):
    path = busi(tmp_path/'d', n_labelled=6, n_valid=2, archive=shelf)
    whole = [m*255 for _,m in samples('busi_320', 13)]
    found = {i.stem: load_mask(l) for s in ('train', 'valid', 'test') for i,l in split_files(path, s)}
    assert found.keys()=={*[f'benign ({i})' for i in range(1, 7)], *[f'malignant ({i})' for i in range(1, 5)]}
    for k,m in found.items():
        kind,i = re.match(r'(\w+) \((\d+)\)', k).groups()
        assert (m==whole[int(i)-1+6*(kind=='malignant')]).all(), k

def test_busi_with_normal(shelf, tmp_path):
    path = busi(tmp_path/'d', n_labelled=8, n_valid=2, normal=True, archive=shelf)
    normal = [l for s in ('train', 'valid', 'test') for i,l in split_files(path, s) if i.stem.startswith('normal')]
    assert len(normal)==3 and not any(load_mask(l).any() for l in normal)

def test_mask_a_pixel_too_large(tmp_path):
    cases = {}
    for i,(im,m) in enumerate(samples('busi_320', 4)):
        big = np.pad(m, ((0, 1), (0, 2)), 'edge')
        for s,a in {'': im, '_mask': big*255}.items(): cases[f'B/benign/benign ({i}){s}.png'] = picture(a, 'png')
    path = busi(tmp_path/'d', 1, 1, archive=pack(tmp_path/'a.zip', cases))
    assert check_dataset(path).counts==dict(train=1, valid=1, test=1, unlabeled=1)

def parts(path): return dict({s: names(path, s) for s in ('train', 'valid', 'test')}, unlabeled={f.stem for f in unlabeled_files(path)})

def patient(stem): return re.match(r'coronacases_\d+|radiopaedia_\d+', stem)[0]

@pytest.mark.parametrize('every,slices', [(1, range(1, 6)), (2, range(1, 6, 2))])
def test_covid_slices_by_patient(shelf, tmp_path, every, slices):
    path = covid_ct(tmp_path/'d', n_labelled=4, n_valid=2, every=every, archive=shelf)
    found = parts(path)
    people = {k: {patient(o) for o in v} for k,v in found.items()}
    assert not people['test'] & (people['valid'] | people['train'] | people['unlabeled']) and not people['valid'] & (people['train'] | people['unlabeled'])
    assert len(people['test'])==2 and len(people['train'])==4
    every_one = {f'{k}_{i:03}' for k in PATIENTS for i in slices}
    left_out = every_one-set().union(*found.values())
    assert set().union(*found.values())<=every_one and {patient(o) for o in left_out}==people['valid']
    assert found['test']=={o for o in every_one if patient(o) in people['test']}

def test_covid_pixels(shelf, tmp_path):
    path = covid_ct(tmp_path/'d', n_labelled=12, n_valid=2, every=2, archive=shelf)
    raw = dict(zip(PATIENTS, samples('covid_ct_256', 10, 3)))
    seen = set()
    for s in ('train', 'valid', 'test'):
        for i,l in split_files(path, s):
            k,z = i.stem.rsplit('_', 1)
            im,m = [o[:48, :64].copy() for o in raw[k]]
            m[0, 0] = 1
            grey = np.minimum(im[..., 0], 249)+int(z)
            assert np.abs(load_image(i)[..., 0]-(grey if k[0]=='r' else grey*1.02)).max()<0.51, i.name
            assert (load_mask(l)==np.uint8([0, 128, 255])[m]).all(), l.name
            seen.add(k[0])
    assert seen=={'c', 'r'} and read_codes(path).names==('rest', 'lung', 'infection')

def test_covid_axes_in_another_order(tmp_path):
    (im,m),*_ = samples('covid_ct_256', 1, 3)
    im,m = im[:40, :52, 0],np.uint8([0, 1, 3])[m[:40, :52]]
    m[0, 0] = 1
    upright = [np.rot90(np.stack([o]*4, -1), -1) for o in (im, m)]  # x, y, z
    turned = [np.ascontiguousarray(o.transpose(2, 0, 1)) for o in upright]
    affine = np.eye(4)[[1, 2, 0, 3]]
    files = [pack(tmp_path/f'{n}.zip', {f'coronacases_{i:03}.nii': nib.Nifti1Image(a, w).to_bytes() for i in range(4)}) for n,a,w in (('ct', turned[0], affine), ('mask', turned[1], np.eye(4)))]
    path = covid_ct(tmp_path/'d', 1, 1, archive=files)
    i,l = split_files(path, 'test')[0]
    assert (load_image(i)[..., 0]==im).all() and (load_mask(l)==np.uint8([0, 128, 128, 255])[m]).all()

@pytest.mark.parametrize('every', [0, 1.5, True])
def test_covid_every(shelf, tmp_path, every):
    with pytest.raises(ValueError, match='every is'): covid_ct(tmp_path/'d', every=every, archive=shelf)

def test_interrupted_writing_leaves_nothing(shelf, tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(sources, 'split_groups', stop)
    with pytest.raises(KeyboardInterrupt): kvasir_seg(tmp_path/'d', archive=shelf, **SMALL)
    assert not list(tmp_path.iterdir())

def test_brain_is_what_it_was(tmp_path):
    path = brain_slices(tmp_path/'d', n_labelled=8)
    assert sorted(int(s[-3:]) for s in names(path, 'train'))==[5, 17, 29, 40, 84, 95, 123, 135]
    with pytest.raises(DatasetError, match='holds something else'): brain_slices(path, n_labelled=9)
    (tmp_path/'f').write_text('mine')
    with pytest.raises(DatasetError, match='is a file'): brain_slices(tmp_path/'f')
