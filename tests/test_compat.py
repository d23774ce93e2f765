"The names of 2022: their arguments in the old order, their defaults, and what they call"
from inspect import signature

import pytest
from conftest import NET, SIZE, tree

import semisup_seg.compat as C
from semisup_seg.compat import dataDistillation, modelDataDistillation, modelDistillation, simpleTraining

OLD = {  # chkstyle: ignore-node
    dataDistillation: 'baseModel baseBackbone targetModel targetBackbone transforms path outputPath bs size',
    modelDistillation: 'baseModels baseBackbones targetModel targetBackbone path outputPath bs size',
    modelDataDistillation: 'baseModels baseBackbones targetModel targetBackbone transforms path outputPath bs size',
    simpleTraining: 'baseModel baseBackbone path outputPath bs size'}
CALLS = {  # chkstyle: ignore-node
    dataDistillation: (('A', 'a', 'T', 't', ['V'], 'data', 'out'), 'data_distillation', (('A', 'a'), ('T', 't'), ['V'], 'data', 'out')),
    modelDistillation: ((['A', 'B'], ['a', None], 'T', 't', 'data', 'out'), 'model_distillation', ([('A', 'a'), ('B', None)], ('T', 't'), 'data', 'out')),
    modelDataDistillation: ((['A', 'B'], ['a', 'b'], 'T', 't', ['V'], 'data', 'out'), 'model_data_distillation', ([('A', 'a'), ('B', 'b')], ('T', 't'), ['V'], 'data', 'out')),
    simpleTraining: (('A', 'a', 'data', 'out'), 'simple_training', (('A', 'a'), 'data', 'out'))}

@pytest.mark.parametrize('f', OLD, ids=lambda f: f.__name__)
def test_arguments_and_defaults(f):
    ps = signature(f).parameters
    assert list(ps)==OLD[f].split() and (ps['bs'].default, ps['size'].default)==(32, (480, 640))
    assert [k for k,p in ps.items() if p.default is not p.empty]==['bs', 'size']

@pytest.mark.parametrize('f', CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('by', ['position', 'keyword', 'all by position'])
def test_calls_its_successor(monkeypatch, f, by):
    args,name,want = CALLS[f]
    monkeypatch.setattr(C, name, lambda *a, **kw: (a, kw))
    if by=='keyword': got = f(**dict(zip(OLD[f].split(), args)))
    else: got = f(*args) if by=='position' else f(*args, 4, (64, 96))
    assert got==(want, dict(bs=4, size=(64, 96)) if by=='all by position' else dict(bs=32, size=(480, 640)))

@pytest.mark.parametrize('models,backbones', [(['U-Net', 'PAN'], ['resnet18']), ([], ['resnet18']), ('U-Net', 'resnet18'), (['U-Net'], None), (None, None)])
@pytest.mark.parametrize('f', [modelDistillation, modelDataDistillation])
def test_lists_that_do_not_match(trained_discs, tmp_path, f, models, backbones):
    views = [['H Flip']] if f is modelDataDistillation else []
    with pytest.raises(ValueError, match='two lists of equal length'): f(models, backbones, *NET, *views, trained_discs, tmp_path/'out')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('bad,message', [
    (dict(baseModels=[], baseBackbones=[]), 'at least two'), (dict(baseModels=['U-Net', 'Nix']), "Unknown network 'Nix'"), (dict(targetBackbone='resnet5O'), "Did you mean 'resnet50'"),
    (dict(transforms=['Flip it']), "Unknown view 'Flip it'"), (dict(transforms=[]), 'views: none given'), (dict(size=(4, 4)), 'size is'), (dict(bs=1), 'bs is 1')])
def test_mistakes_are_errors_before_anything_is_trained(trained_discs, tmp_path, bad, message):
    args = dict(baseModels=['U-Net']*2, baseBackbones=['test_resnet']*2, targetModel='U-Net', targetBackbone='test_resnet', transforms=['H Flip'], path=trained_discs, outputPath=tmp_path/'out', bs=4, size=SIZE)
    with pytest.raises(ValueError, match=message): modelDataDistillation(**{**args, **bad})
    assert not (tmp_path/'out').exists()

def test_a_whole_run(monkeypatch, trained_discs, tmp_path):
    from semisup_seg.distillation import distill as D
    real = D.fit
    monkeypatch.setattr(D, 'fit', lambda learn, epochs, freeze_epochs, lr, **kw: real(learn, 1, 0, 1e-3, **kw))  # twenty epochs are the default
    monkeypatch.setattr(D, 'build_model', lambda *a, **kw: None)  # no weights for this encoder
    build = D.seg_learner
    monkeypatch.setattr(D, 'seg_learner', lambda dls, *pair, pretrained=False: build(dls, *pair))
    res = modelDataDistillation(['U-Net', 'CGNet'], ['test_resnet', None], 'MAnet', 'test_resnet', ['H Flip', 'Gamma'], trained_discs, tmp_path/'out', 4, SIZE)
    assert {'base_U-Net_test_resnet.pth', 'base_CGNet.pth', 'target_MANet_test_resnet.pth', 'annotations.csv', 'report.html'} <= tree(tmp_path/'out').keys() and len(res.annotations)==5
