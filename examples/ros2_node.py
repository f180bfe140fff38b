#!/usr/bin/env python3
"""A node of ROS 2 that segments images: the class map, the overlay and the labels are published.

Not run on ROS so far: it was written where rclpy cannot be installed. The tests run it with
messages made from ROS's definitions, in place of rclpy.

    python3 ros2_node.py --ros-args -r image:=/camera/image_raw -p bundle:=street.knet

Subscribes to ``image`` (sensor_msgs/Image) and publishes, with the header of each image,

    ~/classes   sensor_msgs/Image, mono8 (mono16 beyond 256 classes): class indices
    ~/overlay   sensor_msgs/Image, rgb8
    ~/labels    std_msgs/String, latched: JSON of what the indices mean
"""

from __future__ import annotations

import json
from array import array

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String

from knet_deploy import KnetError, Segmenter, read_ros_image


class SegmenterNode(Node):
    def __init__(self):
        super().__init__("segmentation")
        bundle = self.declare_parameter("bundle", "").value  # the packaged model by default
        self.segment = Segmenter(bundle or None)
        self.segment.self_test()
        self.classes = self.create_publisher(Image, "~/classes", 10)
        self.overlay = self.create_publisher(Image, "~/overlay", 10)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.labels = self.create_publisher(String, "~/labels", latched)
        names = dict(enumerate(self.segment.labels.names))
        self.labels.publish(String(data=json.dumps(names, ensure_ascii=False)))
        # Of images that come while one is segmented, the newest is taken: no queue, no delay.
        newest = QoSProfile(depth=1, reliability=qos_profile_sensor_data.reliability)
        self.create_subscription(Image, "image", self.on_image, newest)

    def on_image(self, message):
        try:
            image = read_ros_image(message)
        except KnetError as error:
            self.get_logger().error(str(error), throttle_duration_sec=5.0)
            return
        result = self.segment(image)
        deep = result.class_map.itemsize == 2
        self.classes.publish(
            image_message(message.header, "mono16" if deep else "mono8", result.class_map)
        )
        if self.overlay.get_subscription_count():
            self.overlay.publish(image_message(message.header, "rgb8", result.overlay(image)))


def image_message(header, encoding, pixels):
    message = Image(header=header, encoding=encoding)
    message.height, message.width = pixels.shape[:2]
    message.step = pixels.strides[0]
    message.is_bigendian = 0
    # An array of bytes is taken as it is; a list would be checked byte by byte.
    little = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    message.data = array("B", little.tobytes())
    return message


def main():
    rclpy.init()
    node = SegmenterNode()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.segment.close()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
