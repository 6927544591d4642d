"""A model behind HTTP: a page to watch and steer a stream with, and the WebSocket protocol that it speaks.

`protocol` says what is sent, `app` where; `client.Client` is the other end in Python. Pictures go as H.264 over the
same WebSocket as the words about them, rather than by WebRTC: a stream needs one TCP port and no address discovery,
frames keep their numbers, so that a receipt names the frame that it is about, and a viewer that reads slowly slows its
stream down instead of filling memory. WebRTC would win on lossy networks, where a lost packet holds up TCP.

Browsers keep WebCodecs, and with it H.264 by hand, to pages that come from this machine or over https. On a phone that
opened the page over plain http the client asks for the other codec, "jpeg": every frame a picture, which any browser
draws on a canvas. That costs several times the bytes, and no latency.
"""
