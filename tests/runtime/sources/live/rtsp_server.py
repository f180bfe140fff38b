"""A real RTSP server with a moving frame, for tests and benchmarks; GStreamer's, on 127.0.0.1.

    /usr/bin/python3 rtsp_server.py --port 8554 [--user U --password P] [--certificate FILE.pem]

Needs Debian's python3-gi, gir1.2-gst-rtsp-server-1.0 and GStreamer's good, bad and ugly plugins, so
the system's Python. Prints the port when it listens; /live is the stream. Port 0 takes a free one.
"""

from __future__ import annotations

import argparse

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gio, GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--certificate")
    parser.add_argument("--size", default="160x120")
    parser.add_argument("--rate", type=int, default=30)
    arguments = parser.parse_args()

    Gst.init(None)
    width, height = arguments.size.split("x")
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        "( videotestsrc is-live=true pattern=ball"
        f" ! video/x-raw,width={width},height={height},framerate={arguments.rate}/1"
        " ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15"
        " ! rtph264pay name=pay0 pt=96 config-interval=1 )"
    )
    factory.set_shared(True)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(arguments.port))
    if arguments.user or arguments.certificate:
        auth = GstRtspServer.RTSPAuth()
        role = "viewer"
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", role)
        factory.add_role_from_structure(
            Gst.Structure.from_string(
                f"{role}, media.factory.access=(boolean)true, media.factory.construct=(boolean)true"
            )[0]
        )
        if arguments.user:
            basic = GstRtspServer.RTSPAuth.make_basic(arguments.user, arguments.password)
            auth.add_basic(basic, token)
            auth.set_supported_methods(GstRtsp.RTSPAuthMethod.BASIC)
        else:
            auth.set_default_token(token)
        if arguments.certificate:
            auth.set_tls_certificate(Gio.TlsCertificate.new_from_file(arguments.certificate))
        server.set_auth(auth)
    server.get_mount_points().add_factory("/live", factory)
    server.attach(None)
    print(server.get_bound_port(), flush=True)  # noqa: T201
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
