"The names of version 0.0: their arguments in the old order, their defaults, and the calls that they make"
from inspect import signature

import pytest

import semisup_seg.compat as C
from semisup_seg.compat import dataDistillation, modelDataDistillation, modelDistillation, simpleTraining

OLD = {  # chkstyle: ignore-node
    dataDistillation: 'baseModel baseBackbone targetModel targetBackbone transforms path outputPath bs size',
    modelDistillation: 'baseModels baseBackbones targetModel targetBackbone path outputPath bs size',
    modelDataDistillation: 'baseModels baseBackbones targetModel targetBackbone transforms path outputPath bs size',
    simpleTraining: 'baseModel baseBackbone path outputPath bs size'}
TARGET = dict(target=('T', 't'), path='data', out='out')
CALLS = {  # chkstyle: ignore-node
    dataDistillation: ('data_distillation', ('A', 'a', 'T', 't', ['V'], 'data', 'out'), dict(TARGET, base=('A', 'a'), views=['V'])),
    modelDistillation: ('model_distillation', (['A', 'B'], ['a', None], 'T', 't', 'data', 'out'), dict(TARGET, bases=[('A', 'a'), ('B', None)])),
    modelDataDistillation: ('model_data_distillation', (['A', 'B'], ('a', None), 'T', 't', ['V'], 'data', 'out'), dict(TARGET, bases=[('A', 'a'), ('B', None)], views=['V'])),
    simpleTraining: ('simple_training', ('T', 't', 'data', 'out'), TARGET)}
each = pytest.mark.parametrize('f', OLD, ids=lambda f: f.__name__)

@each
def test_arguments_keep_their_order_and_defaults(f):
    params = signature(f).parameters
    assert list(params)==OLD[f].split()
    defaults = {k: p.default for k,p in params.items() if p.default is not p.empty}
    assert defaults==dict(bs=32, size=(480, 640))

@pytest.fixture
def called(monkeypatch):
    "Put a spy in the place of a routine: a wrapper then returns the arguments that the routine would get, by their names"
    def _replace(name):
        takes = signature(getattr(C, name))
        monkeypatch.setattr(C, name, lambda *args, **kw: takes.bind(*args, **kw).arguments)
    return _replace

@each
def test_a_call_reaches_the_successor(called, f):
    name,args,want = CALLS[f]
    called(name)
    default = dict(want, bs=32, size=(480, 640))
    assert f(*args)==default
    assert f(**dict(zip(OLD[f].split(), args)))==default
    assert f(*args, 4, (64, 96))==dict(want, bs=4, size=(64, 96))

@pytest.mark.parametrize('f', [modelDistillation, modelDataDistillation])
def test_lists_that_do_not_match_are_refused(called, f):
    name,args,_ = CALLS[f]
    called(name)
    for models,backbones in ((['U-Net', 'PAN'], ['resnet18']), ([], ['resnet18']), ('U-Net', 'resnet18'), (['U-Net'], None), (None, None)):
        with pytest.raises(ValueError, match='two lists of equal length'): f(models, backbones, *args[2:])

def test_a_mistake_is_an_error_of_the_successor():
    with pytest.raises(ValueError, match="Unknown view 'Flip it'"): modelDataDistillation(['PAN']*2, [None]*2, 'PAN', None, ['Flip it'], 'data', 'out')
