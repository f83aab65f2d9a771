"""DualSpeed inside other frameworks, at the plug-in points that they offer.

Each module names the version of the framework that it was written against. None of them is loaded by trimtab itself.
"""
