"""Files in and out: rasters, vectors, tables and STAC.

Images without georeference, and those with both an alpha band and nodata, are normal input here. rasterio warns of each
one when it is opened; filters of warnings belong to the process, so those for these warnings are set once, by this
import, and never under a lock.
"""

import warnings

from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning

warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
warnings.filterwarnings("ignore", category=NodataShadowWarning)
