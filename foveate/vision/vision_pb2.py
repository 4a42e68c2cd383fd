"""The messages of vision.proto, made from its compiled form: generated code would be bound to one protobuf version.

``make proto`` compiles it to ``vision.protoset``, and to ``vision_pb2.pyi`` for type checkers.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FILES = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("vision.protoset").read_bytes())
DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(_FILES.file[0].SerializeToString())
globals().update(
    {name: message_factory.GetMessageClass(message) for name, message in DESCRIPTOR.message_types_by_name.items()}
)
