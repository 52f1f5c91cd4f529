"""How the demo model was made: networks, two training stages, and the saving of the folder.

Not part of the wheel. `train.py` beside this package runs everything from nothing.
"""
