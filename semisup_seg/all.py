"Everything by one import: `from semisup_seg.all import *`"
from semisup_seg.core import *
from semisup_seg.data import *
from semisup_seg.datasets import *
from semisup_seg.models.core import *
from semisup_seg.models.cgnet import *
from semisup_seg.models.fpenet import *
from semisup_seg.models.lednet import *
from semisup_seg.models.denseaspp import *
from semisup_seg.models.ocnet import *
from semisup_seg.models.hrnet import *
from semisup_seg.models.smp import *
from semisup_seg.learner import *
from semisup_seg.views import *
from semisup_seg.annotate import *
from semisup_seg.report import *
from semisup_seg.distill import *
