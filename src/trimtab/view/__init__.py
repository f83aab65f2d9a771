"""The live view: a page on this machine that shows which visual tokens of an image stay.

==========  ==========================================================================================
module      what it does
==========  ==========================================================================================
gate        what reaches the page at all: host, token, origin, route, size; and the headers of every reply
uploads     which files count as images, decided by decoding them; where they are kept
desk        the images looked at, the pruners asked, the model's answers; one at a time
drawing     kept tokens and heat maps as pictures
panels      what the page shows, as HTML in which every word of a user is escaped
page        the controls, built with Gradio
server      the socket, the folder for images, the start and the end
==========  ==========================================================================================

Needs the extra ``view``; importing this package does not load it.
"""

from trimtab.view.server import serve

__all__ = ["serve"]
