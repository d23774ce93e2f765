"Ten networks and more, registered by name as soon as any of these modules is imported"
from . import cgnet, denseaspp, fpenet, hrnet, lednet, ocnet, smp
