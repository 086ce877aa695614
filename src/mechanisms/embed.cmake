# Writes a C++ file that holds text files as string literals.
#   cmake -DROOT=dir -DFILES="a;b" -DOUT=file.cpp [-DTABLE=name] -P embed.cmake
# FILES are relative to ROOT.
if(NOT TABLE)
  set(TABLE kEmbeddedFiles)
endif()
set(text "#include \"mechanisms/embedded_table.h\"\nnamespace heed {\n")
string(APPEND text "extern const EmbeddedFile ${TABLE}[];\nconst EmbeddedFile ${TABLE}[] = {\n")
foreach(name IN LISTS FILES)
  file(READ "${ROOT}/${name}" content)
  if(content MATCHES "\\)_heed_\"")
    message(FATAL_ERROR "${name} contains )_heed_\" and cannot be embedded")
  endif()
  string(APPEND text "{\"${name}\", R\"_heed_(${content})_heed_\"},\n")
endforeach()
string(APPEND text "{{}, {}},\n};\n}  // namespace heed\n")
file(WRITE "${OUT}" "${text}")
