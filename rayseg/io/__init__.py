"""Files in and out: rasters, vectors, tables and STAC.

Images without georeference are normal input here. rasterio warns of each one when it is opened; filters of warnings
belong to the process, so the one for this warning is set once, by this import, and never under a lock.
"""

import warnings

from rasterio.errors import NotGeoreferencedWarning

warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
