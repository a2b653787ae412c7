"""Run by a Python that has QGIS: render a project, and print what QGIS makes of it as JSON.

render_qgis.py PROJECT PNG LAYER,LAYER
"""

import json
import os
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
from qgis.core import QgsApplication, QgsMapRendererSequentialJob, QgsMapSettings, QgsProject
from qgis.PyQt.QtCore import QSize
from qgis.PyQt.QtGui import QColor

project_file, png, names = sys.argv[1:]
QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], False)
application.initQgis()
project = QgsProject.instance()
assert project.read(project_file), project.error()
layers = {layer.name(): layer for layer in project.mapLayers().values()}
settings = QgsMapSettings()
settings.setLayers([layers[name] for name in names.split(",")])
settings.setDestinationCrs(project.crs())
settings.setExtent(layers["classes"].extent())
settings.setOutputSize(QSize(600, 600))
settings.setBackgroundColor(QColor(255, 255, 255))
job = QgsMapRendererSequentialJob(settings)
job.start()
job.waitForFinished()
job.renderedImage().save(png)
found = {
    name: {
        "valid": layer.isValid(),
        "crs": layer.crs().authid(),
        "renderer": layer.renderer().type(),
        "legend": [item.text() if hasattr(item, "text") else item.label() for item in legend]
        if (legend := getattr(layer.renderer(), "legendSymbolItems", list)())
        else [],
        "count": layer.featureCount() if hasattr(layer, "featureCount") else None,
    }
    for name, layer in layers.items()
}
print(json.dumps({"crs": project.crs().authid(), "layers": found}), flush=True)
os._exit(0)  # QGIS may fail while it ends without a display
